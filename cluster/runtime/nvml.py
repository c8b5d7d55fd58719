"""What a GPU says of itself that torch does not: power, temperature, and its last error (XID), through NVIDIA's management library."""

import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Any

import torch

EVERY = 2.0
"""Seconds between two looks."""


def card_gauges(device: torch.device) -> Callable[[], dict[str, float]]:
    """What reads the gauges of a device: `power_watts`, `temperature_celsius` and `xid`, those that it tells; none of a CPU.

    XIDs are the driver's numbers of errors; the last one since this call counts, 0 if there was none.
    """
    if device.type != "cuda":
        return dict
    import pynvml as nvml

    try:
        nvml.nvmlInit()
        card = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except nvml.NVMLError:  # no library, or a part of a GPU
        return dict
    return _Card(nvml, card).told


def driver_version() -> str:
    """The version of NVIDIA's driver; empty where its library does not tell."""
    import pynvml as nvml

    try:
        nvml.nvmlInit()
        return str(nvml.nvmlSystemGetDriverVersion())
    except nvml.NVMLError:
        return ""


class _Card:
    def __init__(self, nvml: Any, card: Any):
        self._nvml, self._card, self._xid, self._errors = nvml, card, 0, None
        with suppress(nvml.NVMLError):
            errors = nvml.nvmlEventSetCreate()
            nvml.nvmlDeviceRegisterEvents(card, nvml.nvmlEventTypeXidCriticalError, errors)
            self._errors = errors
        self._told = self.read()
        Thread(target=self._watch, name="nvml", daemon=True).start()

    def told(self) -> dict[str, float]:
        """What was read last: who asks is not to wait for a card that does not answer."""
        return self._told

    def _watch(self) -> None:
        with suppress(Exception):  # a library that goes wrong is no reason to stop training
            while True:
                time.sleep(EVERY)
                self._told = self.read()

    def read(self) -> dict[str, float]:
        nvml, found = self._nvml, dict[str, float]()
        with suppress(nvml.NVMLError):
            found["power_watts"] = nvml.nvmlDeviceGetPowerUsage(self._card) / 1000
        with suppress(nvml.NVMLError):
            found["temperature_celsius"] = float(nvml.nvmlDeviceGetTemperature(self._card, nvml.NVML_TEMPERATURE_GPU))
        if self._errors is not None:
            with suppress(nvml.NVMLError):  # that no more errors wait is one, too
                while True:
                    self._xid = nvml.nvmlEventSetWait_v2(self._errors, 0).eventData
            found["xid"] = float(self._xid)
        return found
