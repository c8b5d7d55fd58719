"""A run: from a configuration to weights and scores, through any number of lives.

The steps follow each other: autoencoder -> latents -> diffusion -> evaluation. Each leaves something whole in the run's folder
(an export, a dataset of latents, scores), so a later life goes on where the last one left off.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from cluster.config.loading import ConfigError
from cluster.config.schema import Experiment
from cluster.data.manifest import CURRENT, Manifest
from cluster.driver.berths import Berths
from cluster.driver.interruption import Enough, never
from cluster.driver.launch import launch
from cluster.driver.pin import Pinned, pin, stage_end, write_config
from cluster.driver.plan import gang_with_memory, remarks
from cluster.driver.pretrained import check_pretrained, take_pretrained
from cluster.driver.ray_metrics import told_to_ray
from cluster.driver.ray_train import gang_of
from cluster.evaluation.evaluate import evaluate
from cluster.evaluation.plan import assert_scorable
from cluster.evaluation.validation import SPLIT as VALIDATION
from cluster.evaluation.validation import ValidationClips
from cluster.runs.averages import marks, mixture_at
from cluster.runs.build_latents import build_latents
from cluster.runs.environment import command, environment
from cluster.runs.export import read_export, write_export, write_untrained
from cluster.runs.latents import LatentDataset
from cluster.runs.lease import Lease
from cluster.runs.state import State, Superseded, open_life, update_state, write_state
from cluster.runtime.failures import StageFailed, failure_of
from cluster.runtime.jobs import ended_at, this_job
from cluster.runtime.nodes import is_private
from cluster.runtime.placement import assert_possible
from cluster.runtime.ray_cluster import assert_visible, connect, driver_risk
from cluster.runtime.tasks import raised_in
from cluster.storage import NotFound, StorageError, Store
from cluster.telemetry.accounts import TaskBooks
from cluster.telemetry.books_log import ENDED, JOB, inherit, keeping, read_books
from cluster.telemetry.display import Display
from cluster.telemetry.exporter import Exporter
from cluster.telemetry.metrics_log import validation_name
from cluster.telemetry.monitor import StageMonitor
from cluster.telemetry.receipt import receipt, receipt_text, write_receipt
from cluster.telemetry.tensorboard import write_tensorboard
from cluster.training.job import Job
from cluster.training.warm_start import check_warm_start
from reactdiff.metrics.official import Scores
from reactdiff.stage import Source, flops_per_item, stages_of, stages_over
from reactdiff.stage import stage as stage_of

log = logging.getLogger(__name__)

LAST_SCRAPE = 15.0
"""Seconds a Prometheus that scrapes the run is given to take its last numbers."""


def execute(
    experiment: Experiment,
    pinned: Pinned,
    steps: Sequence[str],
    display: Display,
    trial: str = "",
    wait: bool = True,
    enough: Callable[[], str] = never,
) -> dict[str, Scores]:
    """Bring a run to its end, from wherever it is, while nobody else does.

    Args:
        experiment: the configuration.
        pinned: the run it is, from `pin`.
        steps: which of STEPS to do; what they need of earlier ones must exist.
        display: shows progress.
        trial: of a sweep that this run is, for Prometheus.
        wait: for another driver that is at this run; otherwise it is refused.
        enough: asked all the time; says why the run has come far enough, once it has.

    Returns:
        The scores of the evaluation by row, empty when it was not among the steps.

    Raises:
        ConfigError, StorageError: before anything is written.
        Held: if another driver is at this run and is not to be waited for.
        StageFailed, Superseded, Enough, KeyboardInterrupt: after the state was written.
    """
    for origin in check_run(experiment, pinned, steps):
        display.say(origin)
    pinned.home.assert_conditional_writes()
    with Lease(pinned.store, command(), wait, display.say) as lease:
        named = pinned.saved(experiment).experiment
        while True:
            try:  # who held it may have begun this run
                return _execute(experiment, pin(named, pinned.name), steps, display, trial, lease, enough)
            except Superseded as error:
                if not lease.is_ours():
                    raise
                # It stood still after it had asked for its lease and before it took its number: it will find that the lease is lost.
                display.say(f"{error}; but this process holds the lease, and goes on with the next life")


def _execute(
    experiment: Experiment,
    pinned: Pinned,
    steps: Sequence[str],
    display: Display,
    trial: str,
    lease: Lease,
    enough: Callable[[], str],
) -> dict[str, Scores]:
    """Bring the run to its end; this process holds its lease."""
    there = connect(cpus=experiment.workers.least + 1)
    if there.gpus and is_private() and not experiment.workers.gpu:
        cards = f"{there.gpus:g}"
        display.say(f"no GPU of this machine is used (workers.gpu): workers.gpu=true workers.count={cards}, or make train GPU={cards}")
    if risk := driver_risk():
        display.say(risk)
    assert_possible(gang_of(experiment.workers))
    assert_visible(pinned.home, "run.store")
    assert_visible(pinned.dataset, "data.url", CURRENT)
    lease.assert_held()
    life = open_life(pinned.store, environment(experiment))
    write_config(experiment, pinned, life)
    state = State("RUNNING", life, pinned.manifest.identity, pinned.manifest.hash)
    write_state(pinned.store, state)
    display.say(f"run {pinned.name}, life {life}, in {pinned.store.url}")
    running = _Life(experiment, pinned, state, lease, display, enough)
    with ExitStack() as at_the_end:
        at_the_end.callback(running.settle, trial)
        try:
            running.exporter = at_the_end.enter_context(_exporter(experiment, pinned.name, life, trial))
            earlier = read_books(pinned.store)
            running.faults = inherit(running.exporter.books, earlier, ended_at)
            running.exporter.money(receipt(earlier)["cost"], experiment.telemetry.budget)
            at_the_end.enter_context(told_to_ray(running.exporter))
            at_the_end.enter_context(keeping(pinned.store, running.exporter.books, running.facts))
            for step in steps:
                if why := enough():
                    raise Enough(why)
                running.update(stage=step)
                running.exporter.at(step)
                with _classified(step):
                    _DO[step](running)
        except Superseded:
            running.ended = "SUPERSEDED"
            raise
        except Enough as told:
            running.end("STOPPED", str(told), stage="")  # wherever it was when it heard of it
            raise
        except (KeyboardInterrupt, SystemExit):  # Ray turns SIGTERM into SystemExit
            running.end("STOPPED", "told to end")
            raise
        except BaseException as error:
            if isinstance(error, StageFailed):  # of a step: there is an exporter
                running.exporter.books.ends(error.failure.name, error.stage, error.what)
                running.exporter.failed(error.failure.name)
            running.end("FAILED", str(error))
            raise
        done = tuple(steps) == STEPS
        running.ended = "DONE" if done else "STOPPED"
    running.update(status="DONE" if done else "STOPPED", why="" if done else f"only {', '.join(steps)} asked for")
    return running.scores


def check_run(experiment: Experiment, pinned: Pinned, steps: Sequence[str]) -> list[str]:
    """Refuse what these steps could not do; returns what is to be said before: what a stage starts from, and remarks. Writes nothing.

    Raises:
        ConfigError, ValueError, StorageError: naming the key, and what to give it.
    """
    kinds = stages_over(Source(pinned.manifest.stream_specs, pinned.manifest.frames), experiment.model, experiment.diffusion)
    check_pretrained(experiment, pinned.manifest, pinned.store)
    asked, end = experiment.diffusion, stage_end(experiment, "diffusion", pinned.manifest)
    kept = marks(asked.ema_every, experiment.optim.batch["diffusion"], end) - {end}
    if asked.weak_progress and asked.weak_progress not in kept:
        raise ConfigError(
            f"diffusion.weak_progress is {asked.weak_progress}, where training keeps nothing that could guide; with diffusion.ema_every="
            f"{asked.ema_every} it keeps {', '.join(map(str, sorted(kept))) or 'nothing'}. Or train without diffusion.autoguidance, and "
            f"ask the finished run: python jobs/evaluate.py RUN diffusion.autoguidance={asked.autoguidance} diffusion.weak_progress=ITEMS"
        )
    for progress in filter(None, (end, asked.weak_progress)) if asked.ema_length else ():
        mixture_at(experiment, "diffusion", progress, asked.ema_length)
    if experiment.diffusion.other_target and pinned.manifest.split(experiment.data.split).appropriateness is None:
        raise ConfigError(
            f"diffusion.other_target is {experiment.diffusion.other_target}, but the dataset at {experiment.data.url} does not say which "
            f"reactions are appropriate in split {experiment.data.split}: prepare it anew with python jobs/prepare.py react2024 "
            "--one-to-many, or set diffusion.other_target=0"
        )
    if "evaluation" in steps:
        assert_scorable(pinned.manifest, experiment.evaluation.split)
    return [*check_warm_start(experiment, kinds), *remarks(experiment, pinned.manifest)]


@contextmanager
def _exporter(experiment: Experiment, run: str, life: int, trial: str) -> Iterator[Exporter]:
    """Serve the life's numbers for Prometheus until the block ends and they were scraped."""
    exporter = Exporter(run, life, trial, host=experiment.telemetry.host, port=experiment.telemetry.port)
    try:
        exporter.write_target(experiment.telemetry.targets)
        yield exporter
    finally:
        exporter.at("")  # however it ends: who looks at the last numbers is not to take it for lost
        exporter.drain(LAST_SCRAPE)
        exporter.close()


class _Life:
    """One start of a run's driver; each step's method brings it to its end, wherever it stood.

    Attributes:
        exporter: serves its numbers, and has its books.
        faults: stage -> why it must be started again, where an earlier life ended by a fault.
        ended: the status it leaves, empty while it lasts.
        untold: whether the store did not take it.
    """

    exporter: Exporter
    faults: dict[str, str]
    ended = ""
    untold = False

    def __init__(
        self, experiment: Experiment, pinned: Pinned, state: State, lease: Lease, display: Display, enough: Callable[[], str]
    ):
        self.experiment, self.store, self.clips = experiment, pinned.store, pinned.manifest
        self.state, self.lease, self.display, self.enough = state, lease, display, enough
        self.run = pinned.saved(experiment)
        self.scores: dict[str, Scores] = {}
        self.job = this_job()

    def facts(self) -> dict[str, Any]:
        """What is kept with the books."""
        tally = self.exporter.tally
        work = {stage: {key: totals[key] for key in ("items", "bytes", "flops")} for stage, totals in tally.stages().items()}
        peaks = {stage: gauges.get("peak_flops", 0.0) for stage, gauges in tally.gauges().items()}
        now = {"stage": self.state.stage, "work": work, "peak": peaks, "gauges": tally.gauges()}
        return {**now, **({JOB: self.job} if self.job else {}), **({ENDED: self.ended} if self.ended else {})}

    def settle(self, trial: str) -> None:
        """Keep the receipt of the run so far, and show it unless the run is one of many; tidy up after those who were killed."""
        if self.ended == "SUPERSEDED" or self.untold:
            return
        try:
            self.lease.assert_held()
            self.store.delete_unfinished()
        except (StorageError, Superseded) as error:  # somebody else tidies up, in the end the store's own rule
            log.info("unfinished uploads were left alone: %s", error)
        try:
            receipt = write_receipt(self.store)
        except StorageError as error:  # the run itself has ended, and how says its state
            log.warning("no receipt: %s", error)
        else:
            if not trial:
                self.display.say(receipt_text(receipt))

    def counter(self, step: str, what: str) -> Callable[[int, int], None]:
        """Show, and tell Prometheus, how many tasks of a step are done."""
        shown = self.display.counter(step, what)

        def tick(done: int, total: int) -> None:
            self.exporter.tasks_done(step, done)
            shown(done, total)

        self.exporter.tasks_done(step, 0)
        return tick

    def tasks(self, stage: str, state: str) -> TaskBooks:
        """The books of a step's tasks, each with what a rank has."""
        berths, each = Berths(self.experiment.telemetry.prices), gang_of(self.experiment.workers).resources
        return TaskBooks(self.exporter.books, stage, state, lambda address: berths.of(address, each))

    def autoencoder(self) -> None:
        if self.experiment.run.autoencoder:
            export = take_pretrained(self.experiment, self.clips, self.store)
            self.display.say(f"stage autoencoder is that of run {self.experiment.run.autoencoder}: weights {export.hash}")
        elif "autoencoder" not in stages_of(self.experiment.model):
            source = Source(self.clips.stream_specs, self.clips.frames)
            write_untrained(self.store, self.experiment, "autoencoder", source, self.clips.hash)
            self.display.say("stage autoencoder has nothing to train: what is denoised are attributes and coefficients themselves")
        else:
            self.train("autoencoder", self.run.dataset, self.clips)

    def latents(self) -> None:
        progress, account = self.counter("latents", "shards"), self.tasks("latents", "encode")
        made = build_latents(self.finished_latents(), self.experiment.workers, progress, account)
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
        progress = self.counter("evaluation", "parts")
        account = self.tasks("evaluation", "evaluate")
        self.scores = evaluate(self.experiment, self.store, self.run.latents(), self.run.diffusion(), progress, account)

    def update(self, **changes: str) -> None:
        """Write the run's changed state.

        Raises:
            Superseded: if another driver has taken the run over.
        """
        self.lease.assert_held()
        self.state = update_state(self.store, self.state, **changes)

    def end(self, status: str, why: str, **changes: str) -> None:
        """Write how the life ended. What ended it is said and decides the exit code, also where the store cannot be told.

        Raises:
            Superseded: if another driver has taken the run over.
        """
        self.ended = status
        try:
            self.update(status=status, why=why, **changes)
        except StorageError as error:
            self.untold = True
            log.error("%s/state.json does not say that the run is %s (%s): %s", self.store.url, status, why, error)

    def finished_latents(self) -> LatentDataset:
        """The finished autoencoder over the run's dataset."""
        self.assert_finished("autoencoder")
        return self.run.latents()

    def assert_finished(self, stage: str) -> None:
        """Refuse to go on from a stage that has not reached its end."""
        export, end = self.run.export(stage), stage_end(self.experiment, stage, self.clips)
        untrained = stage == "autoencoder" and (self.experiment.run.autoencoder or stage not in stages_of(self.experiment.model))
        if export.progress != end and not untrained:
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
        source = Source(manifest.stream_specs, manifest.frames)
        kind = stage_of(stage, self.experiment.model, self.experiment.diffusion, source)
        job = Job(
            experiment=self.experiment,
            stage=stage,
            run=self.store,
            life=self.state.life,
            dataset=dataset,
            manifest=manifest.hash,
            validation=self.validation_clips(stage),
            flops=flops_per_item(kind),
            clips=(self.run.dataset, self.clips.hash),
        )
        self.display.stage(stage, end)
        monitor = StageMonitor(stage, self.exporter, self.display, self.faults.pop(stage, ""))
        trained = launch(job, gang_with_memory(self.experiment, stage, kind), monitor, self.lease.assert_not_taken, self.enough)
        self.lease.assert_held()
        for name in (stage, validation_name(stage)):
            write_tensorboard(self.store, name)
        # The export comes last: where it is, the next life takes the stage for done.
        export = write_export(self.store, self.experiment, stage, source, end)
        without = f"; {trained['quarantined']} items are quarantined" if trained["quarantined"] else ""
        self.display.end(f"stage {stage}: {end} items, weights {export.hash}{without}")

    def validation_clips(self, stage: str) -> ValidationClips | None:
        """What is scored at the checkpoints of a stage, and measured at rungs: only the last one's generate reactions."""
        asked = self.experiment.evaluation.watch or self.experiment.evaluation.rungs
        if not asked or stage != stages_of(self.experiment.model)[-1]:
            return None
        if VALIDATION not in self.clips.splits or self.clips.splits[VALIDATION].appropriateness is None:
            self.display.say(f"the dataset has no split {VALIDATION} with an appropriateness matrix: no clips to watch")
            return None
        return ValidationClips(self.run.dataset, self.clips.hash, self.run.latents() if stage == "diffusion" else None)


@contextmanager
def _classified(step: str) -> Iterator[None]:
    """What ends a step is said with its class of failure; mistakes, of the user's or of the program's, as they are."""
    try:
        yield
    except (StageFailed, Superseded, ValueError):
        raise
    except Exception as error:
        if (failure := failure_of(error)) is None or failure.name == "user":
            raise
        raise StageFailed(step, failure, error, raised_in(error)) from error


_DO: dict[str, Callable[[_Life], None]] = {
    "autoencoder": _Life.autoencoder,
    "latents": _Life.latents,
    "diffusion": _Life.diffusion,
    "evaluation": _Life.evaluation,
}

STEPS = tuple(_DO)
"""What a run goes through, in order."""
