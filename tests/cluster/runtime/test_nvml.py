"""What a GPU says of itself, by a stand-in for NVIDIA's library: no GPU is here."""

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.runtime.nvml import card_gauges, driver_version

CUDA = torch.device("cuda", 0)


class NVMLError(Exception):
    pass


class Library(SimpleNamespace):
    """One GPU, and the XIDs that wait to be read."""

    NVMLError, NVML_TEMPERATURE_GPU, nvmlEventTypeXidCriticalError = NVMLError, 0, 8

    def __init__(self, **missing: bool):
        super().__init__(xids=[], registered=[], missing=missing)

    def _has(self, what: str) -> None:
        if self.missing.get(what):
            raise NVMLError(what)

    def nvmlInit(self) -> None:
        self._has("library")

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.1"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetPowerUsage(self, card: str) -> int:
        self._has("power")
        return 412_345

    def nvmlDeviceGetTemperature(self, card: str, sensor: int) -> int:
        return 63

    def nvmlEventSetCreate(self) -> str:
        self._has("events")
        return "set"

    def nvmlDeviceRegisterEvents(self, card: str, kind: int, events: str) -> None:
        self.registered.append((card, kind, events))

    def nvmlEventSetWait_v2(self, events: str, milliseconds: int) -> Any:
        if not self.xids:
            raise NVMLError("timeout")
        return SimpleNamespace(eventData=self.xids.pop(0))


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.runtime.nvml.EVERY", 0.01)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234-5678"))


def with_library(monkeypatch: pytest.MonkeyPatch, **missing: bool) -> Library:
    library = Library(**missing)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    return library


def test_power_temperature_and_the_last_error_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    library = with_library(monkeypatch)
    read = card_gauges(CUDA)
    assert library.registered == [("GPU-1234-5678", 8, "set")]
    assert read() == {"power_watts": 412.345, "temperature_celsius": 63.0, "xid": 0.0}
    library.xids += [31, 79]
    for _ in range(1000):
        if read()["xid"]:
            break
        time.sleep(0.01)
    assert read()["xid"] == read()["xid"] == 79.0, "the last one, and it stays"


def test_what_a_card_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with_library(monkeypatch, power=True, events=True)
    assert card_gauges(CUDA)() == {"temperature_celsius": 63.0}


def test_without_the_library_or_a_card_there_is_nothing_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    with_library(monkeypatch, library=True)
    assert card_gauges(CUDA)() == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)  # to import it would fail
    assert card_gauges(torch.device("cpu"))() == {}


def test_the_driver_tells_its_version_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with_library(monkeypatch)
    assert driver_version() == "570.1"
    with_library(monkeypatch, library=True)
    assert driver_version() == ""


def test_the_real_library_knows_no_such_card() -> None:
    assert card_gauges(CUDA)() == {}
