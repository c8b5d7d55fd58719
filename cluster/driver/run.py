"""A run: from a configuration to weights and scores, through any number of lives.

The steps follow each other: autoencoder -> latents -> diffusion -> evaluation. Each leaves something whole in the run's folder
(an export, a dataset of latents, scores), so a later life goes on where the last one left off.
"""

from collections.abc import Callable, Sequence

from cluster.config.loading import ConfigError, to_yaml
from cluster.config.schema import Experiment
from cluster.data.manifest import CURRENT, Manifest
from cluster.data.shards import CorruptData
from cluster.driver.launch import launch
from cluster.driver.pin import Pinned, stage_end
from cluster.driver.pretrained import check_pretrained, take_pretrained
from cluster.evaluation.evaluate import evaluate
from cluster.evaluation.plan import assert_scorable
from cluster.evaluation.validation import SPLIT as VALIDATION
from cluster.evaluation.validation import ValidationClips
from cluster.runs.build_latents import build_latents
from cluster.runs.environment import environment
from cluster.runs.export import read_export, write_export
from cluster.runs.latents import LatentDataset
from cluster.runs.state import State, Superseded, open_life, update_state, write_state
from cluster.runtime.failures import StageFailed, classify
from cluster.runtime.ray_cluster import Resources, assert_visible, connect, driver_risk
from cluster.storage import NotFound, Store
from cluster.telemetry.display import Display
from cluster.telemetry.exporter import Exporter
from cluster.telemetry.metrics_log import validation_name
from cluster.telemetry.monitor import StageMonitor
from cluster.telemetry.tensorboard import write_tensorboard
from cluster.training.loop import Job
from cluster.training.warm_start import check_warm_start
from reactdiff.metrics.official import Scores
from reactdiff.stage import Source, stages_of, stages_over

LAST_SCRAPE = 15.0
"""Seconds a Prometheus that scrapes the run is given to take its last numbers."""


def execute(experiment: Experiment, pinned: Pinned, steps: Sequence[str], display: Display, trial: str = "") -> dict[str, Scores]:
    """Bring a run to its end, from wherever it is.

    Args:
        experiment: the configuration.
        pinned: the run it is, from `pin`.
        steps: which of STEPS to do; what they need of earlier ones must exist.
        display: shows progress.
        trial: of a sweep that this run is, for Prometheus.

    Returns:
        The scores of the evaluation by row, empty when it was not among the steps.

    Raises:
        ConfigError, StorageError: before anything is written.
        StageFailed, Superseded, KeyboardInterrupt: after the state was written.
    """
    for origin in check_run(experiment, pinned, steps):
        display.say(origin)
    _say_what_is_missing(experiment, connect(cpus=experiment.workers.count + 1), display)
    if risk := driver_risk():
        display.say(risk)
    pinned.home.assert_conditional_writes()
    assert_visible(pinned.home, "run.store")
    assert_visible(pinned.dataset, "data.url", CURRENT)
    life = open_life(pinned.store, environment(experiment))
    pinned.store.put("config.yaml", to_yaml(experiment).encode())
    state = State("RUNNING", life, pinned.manifest.identity, pinned.manifest.hash)
    write_state(pinned.store, state)
    display.say(f"run {pinned.name}, life {life}, in {pinned.store.url}")
    exporter = Exporter(pinned.name, life, trial, host=experiment.telemetry.host, port=experiment.telemetry.port)
    exporter.write_target(experiment.telemetry.targets)
    running = _Life(experiment, pinned, state, exporter, display)
    try:
        for step in steps:
            running.update(stage=step)
            _DO[step](running)
    except Superseded:
        raise
    except (KeyboardInterrupt, SystemExit):  # Ray turns SIGTERM into SystemExit
        running.update(status="STOPPED", why="told to end")
        raise
    except BaseException as error:
        running.update(status="FAILED", why=str(error))
        raise
    finally:
        exporter.drain(LAST_SCRAPE)
        exporter.close()
    done = tuple(steps) == STEPS
    running.update(status="DONE" if done else "STOPPED", why="" if done else f"only {', '.join(steps)} asked for")
    return running.scores


def check_run(experiment: Experiment, pinned: Pinned, steps: Sequence[str]) -> list[str]:
    """Refuse what these steps could not do, and say what each stage starts from; writes nothing.

    Raises:
        ConfigError, ValueError, StorageError: naming the key, and what to give it.
    """
    kinds = stages_over(Source(pinned.manifest.stream_specs, pinned.manifest.frames), experiment.model, experiment.diffusion)
    check_pretrained(experiment, pinned.manifest, pinned.store)
    if "evaluation" in steps:
        assert_scorable(pinned.manifest, experiment.evaluation.split)
    return check_warm_start(experiment, kinds)


def _say_what_is_missing(experiment: Experiment, there: Resources, display: Display) -> None:
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


class _Life:
    """One start of a run's driver; each step's method brings it to its end, wherever it stood."""

    def __init__(self, experiment: Experiment, pinned: Pinned, state: State, exporter: Exporter, display: Display):
        self.experiment, self.store, self.clips = experiment, pinned.store, pinned.manifest
        self.state, self.exporter, self.display = state, exporter, display
        self.run = pinned.saved(experiment)
        self.scores: dict[str, Scores] = {}

    def autoencoder(self) -> None:
        if self.experiment.run.autoencoder:
            export = take_pretrained(self.experiment, self.clips, self.store)
            self.display.say(f"stage autoencoder is that of run {self.experiment.run.autoencoder}: weights {export.hash}")
        else:
            self.train("autoencoder", self.run.dataset, self.clips)

    def latents(self) -> None:
        try:
            made = build_latents(self.finished_latents(), self.experiment.workers, self.display.counter("latents", "shards"))
        except CorruptData as error:
            raise StageFailed("latents", classify([error])[0], error) from error
        self.display.end(f"latents {made.hash}")

    def diffusion(self) -> None:
        if "diffusion" not in stages_of(self.experiment.model):
            self.display.say(f"family {self.experiment.model.family} has no stage diffusion")
            return
        latents = self.finished_latents()
        self.train("diffusion", latents.store, latents.manifest())

    def evaluation(self) -> None:
        for stage in stages_of(self.experiment.model):
            self.assert_finished(stage)
        progress = self.display.counter("evaluation", "parts")
        self.scores = evaluate(self.experiment, self.store, self.run.latents(), self.run.diffusion(), progress)

    def update(self, **changes: str) -> None:
        """Write the run's changed state."""
        self.state = update_state(self.store, self.state, **changes)

    def finished_latents(self) -> LatentDataset:
        """The finished autoencoder over the run's dataset."""
        self.assert_finished("autoencoder")
        return self.run.latents()

    def assert_finished(self, stage: str) -> None:
        """Refuse to go on from a stage that has not reached its end."""
        export, end = self.run.export(stage), stage_end(self.experiment, stage, self.clips)
        pretrained = stage == "autoencoder" and self.experiment.run.autoencoder
        if export.progress != end and not pretrained:
            raise ConfigError(
                f"run {self.store.url} has not finished stage {stage} (it ends at progress {end}, the newest export is of "
                f"{export.progress}): run it without --stage, or with --stage {stage} first"
            )

    def train(self, stage: str, dataset: Store, manifest: Manifest) -> None:
        """Train a stage to its end and export it, unless that is done."""
        end = stage_end(self.experiment, stage, self.clips)
        try:
            read_export(self.store, stage, end)
            self.display.say(f"stage {stage} is done: {end} items")
            return
        except NotFound:
            pass
        job = Job(self.experiment, stage, self.store, self.state.life, dataset, manifest.hash, self.validation_clips(stage))
        self.display.stage(stage, end)
        trained = launch(job, StageMonitor(stage, self.exporter, self.display).take, self.exporter.restarts, f"{self.store.url}/ray")
        export = write_export(self.store, self.experiment, stage, Source(manifest.stream_specs, manifest.frames), end)
        for name in (stage, validation_name(stage)):
            write_tensorboard(self.store, name)
        without = f"; {trained['quarantined']} items are quarantined" if trained["quarantined"] else ""
        self.display.end(f"stage {stage}: {end} items, weights {export.hash}{without}")

    def validation_clips(self, stage: str) -> ValidationClips | None:
        """What is scored at the checkpoints of a stage: only the last one's generate reactions."""
        if not self.experiment.evaluation.watch or stage != stages_of(self.experiment.model)[-1]:
            return None
        if VALIDATION not in self.clips.splits or self.clips.splits[VALIDATION].appropriateness is None:
            self.display.say(f"the dataset has no split {VALIDATION} with an appropriateness matrix: no clips to watch (evaluation.watch)")
            return None
        return ValidationClips(self.run.dataset, self.clips.hash, self.run.latents() if stage == "diffusion" else None)


_DO: dict[str, Callable[[_Life], None]] = {
    "autoencoder": _Life.autoencoder,
    "latents": _Life.latents,
    "diffusion": _Life.diffusion,
    "evaluation": _Life.evaluation,
}

STEPS = tuple(_DO)
"""What a run goes through, in order."""
