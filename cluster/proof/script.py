"""A seeded script of faults: which, when, and on whom, as data; and the shortest of its parts that still breaks a run."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from cluster.config.spec import nearest
from cluster.runtime.faults import Fault

STRIDE = 80
"""Steps that a fault has to itself, at least, beside those that the run trains on while it lasts."""

STRIDE_SECONDS = 4.0
"""Seconds that it has to itself, at least: a run tells its steps about once a second, and a fast one has ended a stage by then."""

USUAL = 5
"""Faults of a script whose kinds nobody chose."""


class FaultKind(NamedTuple):
    """A kind of fault as `--kinds` names it.

    Attributes:
        does: its name among those of `cluster/runtime/faults.py`, or of those that `cluster/proof/disturbed_run.py` adds.
        means: for people.
        seconds: how long it lasts; infinite: for good, or until the run has noticed.
        beside: seconds that the run may train on meanwhile.
        rank: on whose host it comes, None: on any.
        rootless: whether it needs no host of its own, and so can be done on a user's cluster.
        restarts: whether ranks or driver have to be started again after it; the run may train on until it has noticed.
    """

    does: str
    means: str
    seconds: float = math.inf
    beside: float = 0
    rank: int | None = None
    rootless: bool = False
    restarts: bool = False


FAULT_KINDS: Mapping[str, FaultKind] = {
    "kill": FaultKind("kill", "a rank gets SIGKILL", rootless=True, restarts=True),
    "kill_raylet": FaultKind("kill_raylet", "the raylet of a host gets SIGKILL; its supervisor starts another", restarts=True),
    "power_off": FaultKind("power_off", "a host loses power for good; a spare joins 60 s later", restarts=True),
    "link_20s": FaultKind("cut", "the cable of a host is pulled for 20 s", 20),
    "link_lost": FaultKind("cut", "the cable of a host is pulled for good; a spare joins 60 s later", restarts=True),
    "kill_driver": FaultKind("kill_driver", "the driver gets SIGKILL", rootless=True, restarts=True),
    "restart_head": FaultKind("restart_head", "the GCS gets SIGKILL; the head starts again with the state on its disk", beside=15),
    "drain": FaultKind("drain", "rank 0's host is given notice, and loses power for good 20 s later", 20, rank=0, restarts=True),
    "stop": FaultKind("stop", "a rank gets SIGSTOP", rootless=True, restarts=True),
    "s3_30s": FaultKind("cut_store", "the S3 server cannot be reached for 30 s", 30, beside=30),
    "wrong_bytes": FaultKind("damage_shards", "every shard has wrong bytes until the run has stopped"),
    "nan_gradient": FaultKind("nan_gradient", "the gradient of a rank is NaN until the run has stopped"),
    "disk_full": FaultKind("fill_disk", "the disk of a host is full for 20 s", 20, beside=20),
    "out_of_memory": FaultKind("out_of_memory", "a rank gets no more memory than it has, and needs more, until the run has stopped"),
    "second_driver": FaultKind("second_driver", "the same command is given a second time, with --no-wait", beside=30, rootless=True),
    "frozen_driver": FaultKind("freeze_driver", "the driver gets SIGSTOP, another takes over, then SIGCONT", beside=30, rootless=True),
}
"""What a script can be made of."""


def kind_name(fault: Fault) -> str:
    """What `--kinds` calls a fault of a script."""
    return next(name for name, kind in FAULT_KINDS.items() if (kind.does, kind.seconds) == (fault.kind, fault.seconds))


def choose_kinds(asked: str, seed: int, hosts: bool) -> list[str]:
    """The kinds of a script, each as often as it is to come.

    Args:
        asked: names with commas; "all"; empty: `USUAL` of them, which the seed chooses.
        seed: of the choice.
        hosts: whether the run has hosts of its own.

    Raises:
        ValueError: for a name that is none, or a kind that needs hosts where there are none.
    """
    possible = [name for name, kind in FAULT_KINDS.items() if hosts or kind.rootless]
    if asked in ("", "all"):
        return possible if asked else random.Random(f"kinds {seed}").sample(possible, min(USUAL, len(possible)))
    names = asked.split(",")
    for name in names:
        if name not in FAULT_KINDS:
            raise ValueError(f"there is no kind of fault {name!r}{nearest(name, FAULT_KINDS)}")
        if name not in possible:
            raise ValueError(
                f"{name} needs hosts that this command has made itself, and RAY_ADDRESS names a cluster: leave it out "
                f"(there: {','.join(possible)}), or unset RAY_ADDRESS"
            )
    return names


def steps_of_script(kinds: Sequence[str], stages: Sequence[str], speed: float = 0) -> dict[str, int]:
    """How long the stages of a run have to be for these faults: equally long, with room behind the last fault and at each stage's end.

    Args:
        kinds: names of `FAULT_KINDS`.
        stages: of the run.
        speed: its steps a second, as far as it is known.
    """
    slots = math.ceil((len(kinds) + 1) / len(stages))
    beside = speed * sum(FAULT_KINDS[kind].beside for kind in kinds) / (slots * len(stages))
    return dict.fromkeys(stages, slots * math.ceil(max(STRIDE, STRIDE_SECONDS * speed) + beside))


def steps_of_scripts(scripts: Mapping[int, Sequence[str]], stages: Sequence[str], speed: float = 0) -> dict[str, int]:
    """How long the stages have to be for each of these scripts: seed -> kinds."""
    each = [steps_of_script(kinds, stages, speed) for kinds in scripts.values()]
    return {stage: max(steps[stage] for steps in each) for stage in stages}


def script(seed: int, kinds: Sequence[str], steps: Mapping[str, int], hosts: int) -> list[Fault]:
    """The faults in the order in which they come: a pure function of its arguments.

    Each has a slot of its own, in whose first half it comes: never at the end of a stage, where a rank may be gone before it is hit.

    Args:
        seed: of order, moments and hosts.
        kinds: names of `FAULT_KINDS`, each as often as it is to come.
        steps: stage -> its steps, as `steps_of_script` has them.
        hosts: ranks of the run, each on a host of its own.
    """
    chance = random.Random(f"script {seed}")
    slots = math.ceil((len(kinds) + 1) / len(steps))
    faults = []
    for number, name in enumerate(chance.sample(list(kinds), len(kinds))):
        stage, width = list(steps)[number // slots], steps[list(steps)[number // slots]] // slots
        kind, rank, step = FAULT_KINDS[name], chance.randrange(hosts), number % slots * width + chance.randrange(width // 8, width // 2)
        faults.append(Fault(kind.does, step, stage, rank if kind.rank is None else kind.rank, kind.seconds))
    return faults


def too_late(steps: Mapping[str, int], stage: str, step: int) -> bool:
    """Whether a stage is so near its end that its ranks may be gone before a fault hits them: a late fault waits for the next stage."""
    return step > steps[stage] - STRIDE // 4


def shrink(faults: Sequence[Fault], fails: Callable[[list[Fault]], bool]) -> list[Fault]:
    """The shortest script that still fails, in the sense that it does not without any one of its faults.

    Delta debugging (Zeller and Hildebrandt, 2002), by complements: parts are left out, ever smaller ones.

    Args:
        faults: a script that fails.
        fails: whether a shorter one does; called for each try.
    """
    left, parts = list(faults), 2
    while len(left) > 1:
        size = math.ceil(len(left) / parts)
        for start in range(0, len(left), size):
            without = left[:start] + left[start + size :]
            if without and fails(without):
                left, parts = without, max(2, parts - 1)
                break
        else:
            if size == 1:
                break
            parts = min(len(left), 2 * parts)
    return left
