"""A run: from a configuration to weights and scores, through any number of lives.

The stages follow each other: autoencoder -> latents -> diffusion -> evaluation. Each leaves something whole in the run's folder
(an export, a dataset of latents, scores), so a later life goes on where the last one left off.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from typing import Any

import yaml

from cluster.config.loading import ConfigError, build, digest, ends, identity, placement, to_yaml
from cluster.config.schema import Experiment
from cluster.data.manifest import CURRENT, Manifest, load_manifest
from cluster.data.shards import CorruptData
from cluster.evaluation.evaluate import assert_scorable, evaluate
from cluster.evaluation.validation import SPLIT as WATCHED
from cluster.evaluation.validation import ValidationClips
from cluster.runs import checkpoint
from cluster.runs.build_latents import build_latents
from cluster.runs.export import read_export, write_export
from cluster.runs.latents import LatentDataset
from cluster.runs.saved import SavedRun
from cluster.runs.state import State, Superseded, open_life, read_state, update_state, write_state
from cluster.runtime.failures import StageFailed, classify
from cluster.runtime.ray_cluster import Resources, assert_visible, connect
from cluster.storage import NotFound, Store, open_store
from cluster.telemetry.display import Display
from cluster.telemetry.exporter import Exporter
from cluster.telemetry.meter import Snapshot, Totals
from cluster.telemetry.metrics_log import validation_name, write_tensorboard
from cluster.training import pretrained as adopt
from cluster.training import warm_start as start
from cluster.training.launch import launch
from cluster.training.loop import Job
from reactdiff.metrics.official import Scores
from reactdiff.stage import Source, stages_of, stages_over

STEPS = ("autoencoder", "latents", "diffusion", "evaluation")
"""What a run goes through, in order."""


LAST_SCRAPE = 15.0
"""Seconds a Prometheus that scrapes the run is given to take its last numbers."""


@dataclass(frozen=True)
class Pinned:
    """A run's name and folder, and the dataset state it is pinned to."""

    name: str
    store: Store
    manifest: Manifest
    fresh: bool


def pin(experiment: Experiment, config_name: str) -> Pinned:
    """Find the run an experiment stands for, or the place where it will be; writes nothing.

    Raises:
        ConfigError: if the name belongs to a run of another identity, or the end would shrink.
        StorageError: if the dataset or the store cannot be read.
    """
    dataset = open_store(experiment.data.url)
    current = load_manifest(dataset, experiment.data.manifest)
    name = experiment.run.name or f"{config_name}-{digest([identity(experiment), current.identity])[:8]}"
    store = open_store(experiment.run.store).at(f"runs/{name}")
    try:
        before = build(yaml.safe_load(store.read("config.yaml")), f"{store.url}/config.yaml")
    except NotFound:
        return Pinned(name, store, current, fresh=True)
    _assert_same(name, before, experiment)
    was, now = (one.optim.epochs["autoencoder"] for one in (before, experiment))
    if now > was and checkpoint.list_checkpoints(store, "diffusion"):
        raise ConfigError(
            f"optim.epochs.autoencoder is {now:g}, but stage diffusion of run {name} was trained on the latents of {was:g} epochs: "
            "grow optim.epochs.diffusion alone, or choose another run.name"
        )
    state = read_state(store)
    if state is None:
        return Pinned(name, store, current, fresh=False)
    if state.dataset != current.identity:
        raise ConfigError(
            f"run {name} is pinned to dataset {state.dataset}, but data.url={experiment.data.url} holds dataset {current.identity}: "
            "point data.url at the run's dataset, or choose another run.name"
        )
    return Pinned(name, store, load_manifest(dataset, state.manifest), fresh=False)


def _assert_same(name: str, before: Experiment, now: Experiment) -> None:
    old, new = identity(before), identity(now)
    differing = [f"{key} (was {json.dumps(old[key])}, now {json.dumps(new[key])})" for key in new if old[key] != new[key]]
    if differing:
        raise ConfigError(
            f"run {name} exists with another identity; differing: {', '.join(differing)}. Choose another run.name, or set these back"
        )
    for key, stages in ends(now).items():
        for stage, end in stages.items():
            if end < ends(before)[key][stage]:
                was = ends(before)[key][stage]
                raise ConfigError(f"{key}.{stage} is {end}, but run {name} was started with {was}; the end of a run may only grow")


def execute(experiment: Experiment, config_name: str, steps: Sequence[str], display: Display, trial: str = "") -> dict[str, Scores]:
    """Bring a run to its end, from wherever it is.

    Args:
        experiment: the configuration.
        config_name: stem of the configuration file, the first half of a default run name.
        steps: which of STEPS to do; what they need of earlier ones must exist.
        display: shows progress.
        trial: of a sweep that this run is, for Prometheus.

    Returns:
        The scores of the evaluation by row, empty when it was not among the steps.

    Raises:
        ConfigError, StorageError: before anything is written.
        StageFailed, Superseded, KeyboardInterrupt: after the state was written.
    """
    pinned = pin(experiment, config_name)
    for origin in check_run(experiment, pinned, steps):
        display.say(origin)
    _say_what_lacks(experiment, connect(cpus=experiment.workers.count + 1), display)
    open_store(experiment.run.store).assert_conditional_writes()
    assert_visible(open_store(experiment.run.store), "run.store")
    assert_visible(open_store(experiment.data.url), "data.url", CURRENT)
    life = open_life(pinned.store, _environment(experiment))
    pinned.store.put("config.yaml", to_yaml(experiment).encode())
    state = State("RUNNING", life, pinned.manifest.identity, pinned.manifest.hash)
    write_state(pinned.store, state)
    display.say(f"run {pinned.name}, life {life}, in {pinned.store.url}")
    exporter = Exporter(pinned.name, life, trial, host=experiment.telemetry.host, port=experiment.telemetry.port)
    exporter.write_target(experiment.telemetry.targets)
    running = _Life(experiment, pinned, life, state, exporter, display)
    try:
        scores = running.go(steps)
    except Superseded:
        raise
    except (KeyboardInterrupt, SystemExit):  # Ray turns SIGTERM into SystemExit
        running.now(status="STOPPED", why="told to end")
        raise
    except BaseException as error:
        running.now(status="FAILED", why=str(error))
        raise
    finally:
        exporter.drain(LAST_SCRAPE)
        exporter.close()
    done = tuple(steps) == STEPS
    running.now(status="DONE" if done else "STOPPED", why="" if done else f"only {', '.join(steps)} asked for")
    return scores


def check_run(experiment: Experiment, pinned: Pinned, steps: Sequence[str]) -> list[str]:
    """Refuse what these steps could not do, and say what each stage starts from; writes nothing.

    Raises:
        ConfigError, ValueError, StorageError: naming the key, and what to give it.
    """
    kinds = stages_over(Source(pinned.manifest.stream_specs, pinned.manifest.frames), experiment.model, experiment.diffusion)
    adopt.check_pretrained(experiment, pinned.manifest, pinned.store)
    if "evaluation" in steps:
        assert_scorable(pinned.manifest, experiment.evaluation.split)
    return start.check_warm_start(experiment, kinds)


def _say_what_lacks(experiment: Experiment, there: Resources, display: Display) -> None:
    """Ray waits for resources that a cluster may still get; who waits should know for what."""
    workers = experiment.workers
    for what, needed, present in (
        ("CPUs", workers.count * workers.cpus, there.cpus),
        ("GPUs", workers.count * workers.gpu, there.gpus),
    ):
        if needed > present:
            display.say(
                f"the cluster has {present:g} {what} and {workers.count} ranks ask for {needed:g}: waiting until its autoscaler adds them; "
                "if it has none, stop this and lower workers.count"
            )


class Speed:
    """Items per second and share of time waiting for data, over the last ten seconds or so."""

    WINDOW = 10.0

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._past: deque[tuple[float, int, float, float]] = deque()

    def now(self, totals: Totals) -> tuple[float, float]:
        """The speed between the oldest totals kept and these."""
        self._past.append((self._clock(), totals["items"], totals["states"]["data_wait"], sum(totals["states"].values())))
        while len(self._past) > 2 and self._past[-1][0] - self._past[1][0] > self.WINDOW:
            self._past.popleft()
        (then, items, waited, spent), (here, more, longer, all_spent) = self._past[0], self._past[-1]
        return (more - items) / max(here - then, 1e-9), (longer - waited) / max(all_spent - spent, 1e-9)


class _Life:
    """One start of a run's driver; each method brings one step to its end, wherever it stood."""

    def __init__(self, experiment: Experiment, pinned: Pinned, life: int, state: State, exporter: Exporter, display: Display):
        self.experiment, self.store, self.clips, self.life = experiment, pinned.store, pinned.manifest, life
        self.state, self.exporter, self.display = state, exporter, display
        self.opened = SavedRun(experiment, pinned.store, pinned.manifest)
        self.scores: dict[str, Scores] = {}

    def go(self, steps: Sequence[str]) -> dict[str, Scores]:
        for step in steps:
            self.now(stage=step)
            getattr(self, step)()
        return self.scores

    def autoencoder(self) -> None:
        if self.experiment.run.autoencoder:
            export = adopt.take_pretrained(self.experiment, self.clips, self.store)
            self.display.say(f"stage autoencoder is that of run {self.experiment.run.autoencoder}: weights {export.hash}")
        else:
            self.train("autoencoder", self.experiment.data.url, self.clips)

    def latents(self) -> None:
        try:
            made = build_latents(self.coder(), self.experiment.workers, self.display.counter("latents", "shards"))
        except CorruptData as error:
            raise StageFailed("latents", classify([error])[0], error) from error
        self.display.end(f"latents {made.hash}")

    def diffusion(self) -> None:
        if "diffusion" not in stages_of(self.experiment.model):
            self.display.say(f"family {self.experiment.model.family} has no stage diffusion")
            return
        coder = self.coder()
        self.train("diffusion", coder.url, coder.manifest())

    def evaluation(self) -> None:
        progress, coder = self.display.counter("evaluation", "parts"), self.coder()
        for stage in stages_of(self.experiment.model):
            self.assert_finished(stage)
        self.scores = evaluate(self.experiment, self.store.url, coder, self.opened.diffusion(), progress)

    def now(self, **changes: str) -> None:
        """Write the run's changed state."""
        self.state = update_state(self.store, self.state, **changes)

    def coder(self) -> LatentDataset:
        """The finished autoencoder over the run's dataset."""
        self.assert_finished("autoencoder")
        return self.opened.coder()

    def assert_finished(self, stage: str) -> None:
        """Refuse to go on from a stage that has not reached its end."""
        export = self.opened.export(stage)
        adopted = stage == "autoencoder" and self.experiment.run.autoencoder
        if export.progress != self.end(stage) and not adopted:
            raise ConfigError(
                f"run {self.store.url} has not finished stage {stage} (it ends at progress {self.end(stage)}, the newest export is of "
                f"{export.progress}): run it without --stage, or with --stage {stage} first"
            )

    def end(self, stage: str) -> int:
        """Progress at the end of a stage, in items."""
        return stage_end(self.experiment, stage, self.clips)

    def train(self, stage: str, dataset: str, manifest: Manifest) -> None:
        """Train a stage to its end and export it, unless that is done."""
        end = self.end(stage)
        try:
            read_export(self.store, stage, end)
            self.display.say(f"stage {stage} is done: {end} items")
            return
        except NotFound:
            pass
        job = Job(self.experiment, stage, self.store.url, self.life, dataset, manifest.hash, self.watched(stage))
        self.display.stage(stage, end)
        trained = launch(job, self.watch(stage), self.exporter.restarts, f"{self.store.url}/ray")
        export = write_export(self.store, self.experiment, stage, Source(manifest.stream_specs, manifest.frames), end)
        for name in (stage, validation_name(stage)):
            write_tensorboard(self.store, name)
        without = f"; {trained['quarantined']} items are quarantined" if trained["quarantined"] else ""
        self.display.end(f"stage {stage}: {end} items, weights {export.hash}{without}")

    def watched(self, stage: str) -> ValidationClips | None:
        """What is scored at the checkpoints of a stage: only the last one's generate reactions."""
        if not self.experiment.evaluation.watch or stage != stages_of(self.experiment.model)[-1]:
            return None
        if WATCHED not in self.clips.splits or self.clips.splits[WATCHED].appropriateness is None:
            self.display.say(f"the dataset has no split {WATCHED} with an appropriateness matrix: no clips to watch (evaluation.watch)")
            return None
        return ValidationClips(self.experiment.data.url, self.clips.hash, self.opened.coder() if stage == "diffusion" else None)

    def watch(self, stage: str) -> Callable[[Snapshot], None]:
        """Takes the ranks' numbers to the exporter and the display."""
        speed, said = Speed(), 0.0

        def take(snapshot: Snapshot) -> None:
            nonlocal said
            self.exporter.update(snapshot)
            gauges = self.exporter.tally.gauges().get(stage, {})
            if snapshot["rank"] == 0 and "loss" in gauges:
                self.display.update(int(gauges["progress_items"]), gauges["loss"], *speed.now(self.exporter.tally.stages()[stage]))
            if gauges.get("val_progress_items", 0) > said:
                said = gauges["val_progress_items"]
                self.display.say(f"{WATCHED} at {said:,.0f} items: FRCorr {gauges['val_frcorr']:.3f}, FRDist {gauges['val_frdist']:.2f}")

        return take


def stage_end(experiment: Experiment, stage: str, clips: Manifest) -> int:
    """Progress at the end of a stage: epochs times the items of the training split."""
    return int(experiment.optim.epochs[stage] * 2 * int(clips.counts(experiment.data.split).sum()))


def _environment(experiment: Experiment) -> dict[str, Any]:
    """What a life ran on and with, for whoever asks later; no secret is in it."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "pid": os.getpid(),
        "command": sys.argv,
        "python": platform.python_version(),
        "git": git.stdout.strip(),
        "packages": {d.name: d.version for d in distributions()},
        "placement": placement(experiment),
    }
