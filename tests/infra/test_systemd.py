"""The units say what `infra/supervise.py` does: their settings, and what a real systemd makes of them in namespaces of its own."""

import os
import re
import shutil
import signal
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

from infra.supervise import AGAIN, TOLD_TO_END, repeated
from tests.tiny import ROOT

UNITS = ROOT / "infra/systemd"
SERVICES = ["reactdiff-train@.service", "reactdiff-retrain.service"]
SYSTEMD = "/lib/systemd/systemd"
ENTER = ["unshare", "--mount", "--cgroup", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc", "bash", "-c"]
ROOM = "mount --make-rprivate / && umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup && mount -t tmpfs run /run"
PROGRAM = """#!/bin/bash
cd {folder}; set -- $(cat left); code=$1; shift; echo "$*" > left; echo "$code" >> started
[ "$code" -ge 0 ] && exit "$code"
kill "$code" $$; sleep 60
"""
WATCH = """[Unit]
DefaultDependencies=no
SuccessAction=exit-force
[Service]
Type=oneshot
ExecStart=/bin/bash -c 'for i in {{1..600}}; do [ "$(wc -l < {folder}/started)" = {starts} ] && break; sleep 0.05; done; sleep 1'
"""
"""Ends systemd twenty times RestartSec after the last start that is right, time enough for one that is wrong."""



def unit(name: str) -> ConfigParser:
    parser = ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNITS / name)
    return parser


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_repeats_what_supervise_repeats_without_a_limit(name: str) -> None:
    service = unit(name)["Service"]
    assert service["Restart"] == "on-abnormal" and service["RestartForceExitStatus"] == str(AGAIN)
    assert service["RestartPreventExitStatus"].split() == service["SuccessExitStatus"].split() == [str(code) for code in TOLD_TO_END]
    assert unit(name)["Unit"]["StartLimitIntervalSec"] == "0"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_runs_a_job_and_tells_its_driver_alone_to_end(name: str) -> None:
    service = unit(name)["Service"]
    _, job, *_ = service["ExecStart"].split()
    assert (ROOT / job).is_file()
    assert service["KillMode"] == "mixed" and int(service["TimeoutStopSec"]) >= 300


def test_the_timer_starts_the_tick() -> None:
    assert (UNITS / "reactdiff-retrain.timer").exists() and unit("reactdiff-retrain.timer")["Timer"]["OnCalendar"]


def here(name: str, command: str) -> str:
    """A unit with a program, a folder and a user that are there."""
    text = (UNITS / name).read_text().replace("RestartSec=60", "RestartSec=50ms")
    for key, value in (("ExecStart", command), ("WorkingDirectory", "/tmp"), ("User", "root")):
        text = re.sub(rf"^{key}=.*", f"{key}={value}", text, flags=re.MULTILINE)
    return text


@pytest.mark.starts
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    names = {name: name.replace("@", "@demo") for name in (*SERVICES, "reactdiff-retrain.timer")}
    for name, file in names.items():
        (tmp_path / file).write_text(here(name, "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", *(tmp_path / file for file in names.values())], capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if "reactdiff" in line] == []


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists(SYSTEMD) or not shutil.which("unshare") or os.geteuid() != 0, reason="no systemd, or not root")
@pytest.mark.parametrize(
    ("ends", "starts"),
    [
        ([75, -signal.SIGKILL, 75, -signal.SIGSEGV, 75, 0], 6),
        ([75, 1, 0], 2),
        ([-signal.SIGKILL, 2, 0], 2),
        ([130, 0], 1),
        ([143, 0], 1),
        ([-signal.SIGTERM, 0], 1),
        ([-signal.SIGINT, 0], 1),
    ],
)
@pytest.mark.parametrize("name", SERVICES)
def test_a_real_systemd_starts_again_after_75_and_kills_and_after_nothing_else(
    name: str, ends: list[int], starts: int, tmp_path: Path
) -> None:
    assert [repeated(end if end >= 0 else 128 - end) for end in ends[:starts]] == [True] * (starts - 1) + [False]
    units = tmp_path / "units"
    units.mkdir()
    for target in ("sysinit", "basic", "shutdown", "umount", "final", "exit"):
        (units / f"{target}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    (units / "go.target").write_text("[Unit]\nDefaultDependencies=no\nWants=tried.service watch.service\n")
    (tmp_path / "left").write_text(" ".join(map(str, map(int, ends))))
    (tmp_path / "program").write_text(PROGRAM.format(folder=tmp_path))
    (tmp_path / "program").chmod(0o755)
    (tmp_path / "started").touch()
    (units / "watch.service").write_text(WATCH.format(folder=tmp_path, starts=starts))
    tried = here(name, str(tmp_path / "program")).replace("[Unit]\n", "[Unit]\nDefaultDependencies=no\n", 1)
    (units / "tried.service").write_text(tried)
    start = f"{ROOM} && export container=test SYSTEMD_UNIT_PATH={units} && exec {SYSTEMD} --system --unit=go.target --log-target=console"
    done = subprocess.run([*ENTER, start], capture_output=True, text=True, timeout=120)
    started = (tmp_path / "started").read_text().split()
    if not started and ("Operation not permitted" in done.stderr or "Permission denied" in done.stderr):
        pytest.skip(f"no namespaces of its own here: {done.stderr.strip().splitlines()[-1]}")
    assert [int(code) for code in started] == ends[:starts], done.stderr
