"""The proof that a run cannot be lost: it is run undisturbed, then under a script of faults, and both are compared.

Everything is done by commands on hosts, as a user would: nothing here is part of what is proven.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.proof.comparison import Endured, Sameness, Trace, compare_traces, faults_table, steps_a_second
from cluster.proof.disturbed_run import DisturbedRun, NotInjected
from cluster.proof.experiment import CHECKPOINT, Case
from cluster.proof.script import STRIDE, kind_name, script, shrink, steps_of_scripts
from cluster.proof.site import ClusterSite, Site, made_hosts
from cluster.runtime.faults import Fault
from cluster.runtime.machines import MachineError
from cluster.runtime.ray_cluster import connect
from cluster.telemetry.display import Display


@dataclass(frozen=True)
class Proof:
    """What came of one try of a script.

    Attributes:
        endured: the faults that happened.
        sameness: of the two runs, None where the disturbed one did not come to its end.
        why: it did not.
    """

    endured: list[Endured]
    sameness: Sameness | None
    why: str = ""

    @property
    def proven(self) -> bool:
        """Whether the run got over all of it as promised."""
        return self.sameness is not None and self.sameness.proven

    def text(self) -> str:
        """The table and the verdict."""
        end = self.sameness.sentences if self.sameness else [f"the run was lost: {self.why}"]
        return "\n".join([faults_table(self.endured), "", *end, "PROVEN" if self.proven else "NOT PROVEN"])


class Prover:
    """Runs a case undisturbed and under scripts.

    Attributes:
        whole: what the undisturbed run left, once there was one.
    """

    def __init__(self, case: Case, folder: Path, display: Display, on_cluster: bool = False):
        """Run nothing yet.

        Args:
            case: what is run.
            folder: an empty one, for logs.
            display: shows progress.
            on_cluster: whether runs are on the cluster that RAY_ADDRESS names, and not on hosts of namespaces.
        """
        self._case, self._folder, self._display, self._on_cluster = case, folder, display, on_cluster
        self._runs = 0
        self._whole = Trace({}, {})

    def prove(self, scripts: Mapping[int, Sequence[str]], keep: Callable[[int, Proof], None] | None = None) -> int:
        """Prove seeded scripts, one after the other, all beside the same undisturbed run, and say so; one that fails is shortened.

        Args:
            scripts: seed -> the kinds of its faults.
            keep: told what came of a seed, as soon as it is known.

        Returns:
            The exit code: 0 if all are proven.

        Raises:
            MachineError: if the undisturbed run does not end.
        """
        self._steps = steps_of_scripts(scripts, self._case.stages)
        speed = self._undisturbed()
        longer = steps_of_scripts(scripts, self._case.stages, speed)
        if sum(longer.values()) - sum(self._steps.values()) > STRIDE:
            self._display.say(f"it makes {speed:.0f} steps a second, and these faults need their time: once more, with longer stages")
            self._steps = longer
            self._undisturbed()
        lost = [seed for seed, kinds in scripts.items() if not self._proven(seed, kinds, keep or _forget)]
        if len(scripts) > 1:
            proven = [str(seed) for seed in scripts if seed not in lost]
            self._display.end(f"PROVEN: seeds {', '.join(proven) or 'none'}; NOT PROVEN: {', '.join(map(str, lost)) or 'none'}")
        return int(bool(lost))

    def _proven(self, seed: int, kinds: Sequence[str], keep: Callable[[int, Proof], None]) -> bool:
        say = self._display.say
        faults = script(seed, kinds, self._steps, self._case.experiment.workers.most)
        say(f"script of seed {seed}: " + describe(faults))
        try:
            proof = self.attempt(faults)
        except NotInjected as error:
            self._display.end(f"{error}\nNOT PROVEN")
            return False
        keep(seed, proof)
        self._display.end(proof.text())
        if not proof.proven and len(faults) > 1:
            say("looking for the shortest script that fails; each try is a run")
            left = shrink(faults, self._fails)
            say(f"the shortest script that fails: {describe(left)}")
        return proof.proven

    def attempt(self, faults: Sequence[Fault]) -> Proof:
        """Run the case under a script on hosts of its own, and compare."""
        with self._site() as site:
            disturbed = DisturbedRun(self._case, self._steps, site, "disturbed", self._display)
            try:
                trace = disturbed.run(faults)
            except MachineError as error:
                return Proof(disturbed.endured, None, str(error))
        workers = self._case.experiment.workers
        return Proof(disturbed.endured, compare_traces(self._whole, trace, workers.least == workers.most))

    def _fails(self, faults: list[Fault]) -> bool:
        self._display.say(f"try {describe(faults)}")
        try:
            failed = not self.attempt(faults).proven
        except NotInjected as error:
            self._display.say(str(error))
            failed = False
        self._display.say("it fails" if failed else "it passes")
        return failed

    def _undisturbed(self) -> float:
        """Run it undisturbed; the steps a second of its fastest stage."""
        was = ", ".join(f"{stage} {count} (the configuration has {self._case.steps()[stage]})" for stage, count in self._steps.items())
        self._display.say(f"undisturbed: steps of {was}; a checkpoint every {CHECKPOINT}, 2 clips are scored, one rank a host")
        with self._site() as site:
            self._whole = DisturbedRun(self._case, self._steps, site, "undisturbed", self._display).run([])
            return steps_a_second(self._case.run_folder(site), self._case.stages)

    @contextmanager
    def _site(self) -> Iterator[Site]:
        self._runs += 1
        folder, experiment = self._folder / str(self._runs), self._case.experiment
        if self._on_cluster:
            connect()
            folder.mkdir()
            yield ClusterSite(folder, experiment.data.url, f"{experiment.run.store}/{own_prefix(self._folder)}/{self._runs}")
            return
        workers = experiment.workers
        with made_hosts(folder, workers.most, math.ceil(workers.cpus), self._case.dataset) as site:
            yield site


def own_prefix(folder: Path) -> str:
    """Where the objects of a proof on a user's cluster lie, below `run.store`; named as the folder of its logs."""
    return f"proofs/{folder.name}"


def _forget(seed: int, proof: Proof) -> None:
    """Keep nothing."""


def describe(faults: Sequence[Fault]) -> str:
    """A script in words."""
    return "; ".join(f"{kind_name(fault)} of rank {fault.rank} at {fault.stage} {fault.step}" for fault in faults)
