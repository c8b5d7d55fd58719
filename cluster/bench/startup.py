"""From a command to its first step, and from its last step to its end: of a run, and of the least that trains under Ray Train, in turns."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.bench import empty_loop
from cluster.storage import open_store
from cluster.telemetry.metrics_log import every_row

TRAIN = Path(__file__).parents[2] / "jobs" / "train.py"
STAGE = "autoencoder"


@dataclass(frozen=True)
class Startup:
    """Seconds of one command: to the end of its first step, and from the end of its last one."""

    to_first_step: float
    from_last_step: float


def startups(words: Sequence[str], ranks: int, folder: Path, rounds: int, progress: Callable[[int, int], None]) -> dict[str, list[Startup]]:
    """Measure both as often as there are rounds, one after the other, each on a Ray of its own.

    Args:
        words: of the command that trains, behind its name; the dataset is there.
        ranks: it has.
        folder: an empty one.
        rounds: of each.
        progress: told how many of all are done.
    """
    found: dict[str, list[Startup]] = {"a run": [], "an empty loop, stock Ray Train": []}
    for number in range(rounds):
        for place, (name, measure) in enumerate(zip(found, (_ours, _theirs), strict=True)):
            own = folder / f"{number}-{place}"
            own.mkdir()
            found[name].append(measure(words, ranks, own))
            progress(2 * number + place + 1, 2 * rounds)
    return found


def _ours(words: Sequence[str], _: int, folder: Path) -> Startup:
    def steps() -> list[float]:
        return [row["time"] for _, row in every_row(open_store(str(folder / "runs" / "startup")), STAGE)]

    places = (f"run.store={folder}", "run.name=startup", "run.log_every=1")
    return _timed([str(TRAIN), *words, *places, "--stage", STAGE], folder, steps)


def _theirs(_: Sequence[str], ranks: int, folder: Path) -> Startup:
    times = folder / "times"
    return _timed([empty_loop.__file__, str(ranks), str(times)], folder, lambda: [float(one) for one in times.read_text().split()])


def _timed(command: Sequence[str], folder: Path, steps: Callable[[], list[float]]) -> Startup:
    """Run a program of Python and look at the clock before and after; `steps` has the times of its steps.

    Raises:
        RuntimeError: if it fails, with the end of what it said.
    """
    begin = time.time()
    with open(folder / "said", "w") as said:
        code = subprocess.call(
            [sys.executable, *command],
            env=os.environ | {"RAY_ADDRESS": "local", "RAY_ENABLE_AUTO_CONNECT": "1", "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
    end = time.time()
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n" + "\n".join((folder / "said").read_text().splitlines()[-15:]))
    times = steps()
    return Startup(min(times) - begin, end - max(times))
