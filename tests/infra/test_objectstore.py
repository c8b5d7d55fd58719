"""What the S3 server of our own promises: a command finds it, gets its exit code through, and nothing is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.starts

SCRIPT = Path(__file__).parents[2] / "infra" / "objectstore.py"


def start(root: Path, *command: str) -> subprocess.Popen[str]:
    line = [sys.executable, SCRIPT, root, "--bucket", "demo", "--", *command]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def servers(root: Path) -> list[int]:
    """Processes that serve this folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"-dir={root}".encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def lives(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_command_finds_its_bucket_again_and_its_exit_code_comes_through(tmp_path: Path) -> None:
    write = "from cluster.storage import open_store; open_store('s3://demo/x').create('key', b'1'); raise SystemExit(7)"
    read = "from cluster.storage import open_store; assert open_store('s3://demo/x').read('key') == b'1'"
    for program, code in ((write, 7), (read, 0)):
        process = start(tmp_path, sys.executable, "-c", program)
        assert (process.wait(), process.communicate()[1]) == (code, "")
        assert servers(tmp_path) == []
    assert (tmp_path / "s3.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_neither_server_nor_command_outlives_the_launcher(tmp_path: Path, how: signal.Signals) -> None:
    process = start(tmp_path, "sh", "-c", "echo $$; exec sleep 600")
    command = int(process.stdout.readline())
    assert len(servers(tmp_path)) == 1
    process.send_signal(how)
    process.communicate()
    end = time.monotonic() + 20
    while (servers(tmp_path) or lives(command)) and time.monotonic() < end:
        time.sleep(0.05)
    assert servers(tmp_path) == [] and not lives(command)


def test_ctrl_c_reaches_the_command_which_still_finds_the_server(tmp_path: Path) -> None:
    write = (
        "import time\n"
        "from cluster.storage import open_store\n"
        "try:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
        "except KeyboardInterrupt:\n"
        "    time.sleep(1)\n"
        "    open_store('s3://demo/x').create('checkpoint', b'1')\n"
        "    print('written', flush=True)\n"
    )
    line = [sys.executable, SCRIPT, tmp_path, "--bucket", "demo", "--", sys.executable, "-c", write]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    said, _ = process.communicate()
    assert said == "written\n" and servers(tmp_path) == []
