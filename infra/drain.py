"""Tell Ray that this machine will be taken away, and wait until its ranks have left with a checkpoint.

  python infra/drain.py SECONDS

For whoever hears of it first: infra/aws/spot_notice.py, and the preStop hook of a pod (infra/kubernetes/rayjob.yaml). Ray is told by
`ray drain-node`: nothing new is placed here, and drivers see that the machine will go. It ends when no rank is left, or after SECONDS.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

LOOK = 0.5
"""Seconds between two looks at the processes."""

RANK = "ray::RayTrainWorker"
"""How Ray calls the process of a rank."""


def raylet() -> tuple[str, str]:
    """The id of the Ray node on this machine, and the address of its cluster, of the raylet that runs here.

    Raises:
        LookupError: if there is none.
    """
    for words in _commands():
        if words[0].endswith("raylet/raylet"):
            return _given(words, "--node_id="), _given(words, "--gcs-address=")
    raise LookupError("no Ray runs on this machine: start it first (ray start)")


def drain(seconds: int, reason: str) -> None:
    """Tell the cluster that this machine will be taken away in so many seconds.

    Raises:
        LookupError: if no Ray runs here.
        subprocess.CalledProcessError: if the cluster does not take it.
    """
    node, address = raylet()
    what = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", reason]
    where = ["--address", address, "--node-id", node, "--deadline-remaining-seconds", str(seconds)]
    subprocess.run([Path(sys.executable).with_name("ray"), "drain-node", *where, *what], check=True)


def wait_for_ranks(
    seconds: float, clock: Callable[[], float] = time.monotonic, pause: Callable[[float], None] = time.sleep
) -> bool:
    """Wait until no rank is on this machine, or so many seconds; returns whether none is."""
    end = clock() + seconds
    while there := any(words[0].startswith(RANK) for words in _commands()):
        if clock() >= end:
            break
        pause(LOOK)
    return not there


def _commands() -> Iterator[list[str]]:
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield command.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has ended


def _given(words: list[str], option: str) -> str:
    return next(word for word in words if word.startswith(option)).removeprefix(option)


def main() -> int:
    """Tell and wait."""
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        print(__doc__)
        return 2
    seconds = int(sys.argv[1])
    began = time.monotonic()
    try:
        drain(seconds, "this machine is told to end")
    except (LookupError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if wait_for_ranks(seconds - (time.monotonic() - began)) else 1


if __name__ == "__main__":
    sys.exit(main())
