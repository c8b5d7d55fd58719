"""One tick of scheduled retraining: when the dataset has grown, train a candidate on it and let the gate decide.

A tick that dies is repeated by the same call: its run resumes, its scores are kept, and the decision is taken once.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

import yaml
from pydantic import Field

from cluster.config.loading import ConfigError, build
from cluster.config.paths import anchored
from cluster.config.schema import Evaluation, Experiment
from cluster.config.spec import Spec, assignments
from cluster.data.manifest import Manifest, load_manifest
from cluster.driver.pin import pin, stage_end
from cluster.driver.run import STEPS, execute
from cluster.evaluation import gate
from cluster.evaluation.evaluate import evaluate
from cluster.evaluation.gate import Metrics, Rule, frozen_clips, judge
from cluster.evaluation.rows import MODEL
from cluster.runs import registry
from cluster.runs.build_latents import build_latents
from cluster.runs.environment import command
from cluster.runs.export import newest_export, read_export
from cluster.runs.latents import LatentDataset
from cluster.runs.lease import Lease
from cluster.runs.registry import Decision, Version
from cluster.storage import AlreadyExists, Permanent, Store, open_store
from cluster.telemetry.display import Display
from reactdiff.stage import stages_of


class Retraining(Spec):
    """The keys of a retraining's file."""

    rule: Rule = Field(default_factory=lambda: Rule.model_validate({}), description="When a candidate is better than the champion.")


def registry_folder(retraining: Retraining, home: Store) -> Store:
    """The registry's folder in the store of the runs."""
    return home.at(f"registry/{retraining.name}")


def tick(retraining: Retraining, overrides: Sequence[str], display: Display) -> Decision | None:
    """Train and judge a candidate if the dataset has a state that was not judged yet.

    Returns:
        The decision, None if there is nothing new.

    Raises:
        ConfigError, ValueError, StorageError: before anything starts.
        Held: if another tick is at it.
        StageFailed, Superseded, KeyboardInterrupt: as `cluster.driver.run.execute`; nothing is decided then.
    """
    experiment = anchored(retraining.load(overrides))
    if experiment.run.autoencoder:
        raise ConfigError("run.autoencoder has no place in retraining: a candidate is trained whole on the grown dataset; leave it out")
    home, dataset = open_store(experiment.run.store), open_store(experiment.data.url)
    store = registry_folder(retraining, home)
    store.assert_conditional_writes()
    with Lease(store, command(), wait=False) as lease:
        registry.show_champion(store)
        manifest = load_manifest(dataset)
        if before := registry.decision_on(store, manifest.hash):
            state = f"the dataset's current state {manifest.hash}"
            display.say(f"nothing new: decision {before.number} on {state} stands ({before.outcome}: {before.why})")
            return None
        clips = frozen_clips(dataset, manifest, _state(dataset, registry.newest_decision(store)), experiment.data.split)
        name = f"{retraining.name}-{manifest.hash[:8]}"
        candidate = anchored(retraining.load(overrides, assignments({"data.manifest": manifest.hash, "run.name": name})))
        candidate = candidate.model_copy(update={"evaluation": _asked(candidate, clips)})
        execute(candidate, pin(candidate, name), STEPS, display)
        lease.assert_held()
        return _Gate(candidate, home, dataset, display).decide(retraining.rule, store, manifest)


def now() -> str:
    """The time for the record; nothing depends on it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _state(dataset: Store, last: Decision | None) -> Manifest | None:
    """The dataset state the champion was trained on."""
    if last is None or last.champion is None:
        return None
    try:
        return load_manifest(dataset, last.champion.manifest)
    except ValueError as error:
        raise ValueError(
            f"champion {last.champion.run} cannot be compared: {error}. Point data.url at the dataset it was trained on, "
            "or give this model another name"
        ) from error


def _asked(experiment: Experiment, clips: int) -> Evaluation:
    """The evaluation of the gate."""
    return experiment.evaluation.model_copy(update={"split": gate.SPLIT, "clips": clips, "baselines": False})


@dataclass(frozen=True)
class _Gate:
    """Judges a candidate against the champion.

    Attributes:
        experiment: of the candidate.
        home: the store of the runs.
        dataset: that both are judged on.
        display: shows progress.
    """

    experiment: Experiment
    home: Store
    dataset: Store
    display: Display

    def decide(self, rule: Rule, store: Store, manifest: Manifest) -> Decision:
        """Take a decision in the registry `store`; again, if another tick decides something in between."""
        candidate = self.version(manifest)
        while True:
            if before := registry.decision_on(store, manifest.hash):
                return before  # another tick judged the same candidate
            last = registry.newest_decision(store)
            champion = last.champion if last else None
            clips = frozen_clips(self.dataset, manifest, _state(self.dataset, last), self.experiment.data.split)
            new = self.scores(candidate, clips)
            old = self.scores(champion, clips) if champion else None
            better, why = judge(rule, new, old)
            decision = Decision(
                outcome="promoted" if better else "kept",
                champion=candidate if better else champion,
                why=why,
                candidate=candidate,
                before=champion,
                compared={"rule": rule.model_dump(), **_asked(self.experiment, clips).model_dump(), "candidate": new, "champion": old},
                at=now(),
            )
            try:
                return registry.append_decision(store, decision, last)
            except AlreadyExists:
                continue

    def version(self, manifest: Manifest) -> Version:
        """The finished run of the candidate."""
        store, stages = self.run(self.experiment.run.name), stages_of(self.experiment.model)
        exports = {stage: read_export(store, stage, stage_end(self.experiment, stage, manifest)) for stage in stages}
        progress, weights = ({stage: getattr(export, what) for stage, export in exports.items()} for what in ("progress", "hash"))
        return Version(self.experiment.run.name, manifest.hash, progress, weights)

    def run(self, name: str) -> Store:
        """The folder of a run."""
        return self.home.at(f"runs/{name}")

    def scores(self, version: Version, clips: int) -> Metrics:
        """A version's metrics on the gate; what was scored before is kept, also when the champion changes."""
        store, asked = self.run(version.run), self.experiment
        exports = {stage: read_export(store, stage, version.progress[stage]) for stage in version.progress}
        if (found := {stage: export.hash for stage, export in exports.items()}) != version.weights:
            raise Permanent(f"{store.url} has exports {found}, but the registry knows {version.weights}: restore the run from a copy")
        trained = build(yaml.safe_load(store.read("config.yaml")), f"{store.url}/config.yaml")
        data, export = trained.data, exports.get("autoencoder") or newest_export(store, "autoencoder")
        latents = LatentDataset(export, store, self.dataset, version.manifest, self.home, data.split, data.on_corrupt)
        build_latents(latents, asked.workers, self.display.counter(f"latents of {version.run}", "shards"))
        judged = trained.model_copy(update={"evaluation": _asked(asked, clips), "workers": asked.workers})
        progress = self.display.counter(f"gate, {version.run}", "parts")
        scores = evaluate(judged, store, latents, exports.get("diffusion"), progress)[MODEL].to_dict()
        return scores["official"] | scores["repaired"] | scores["extra"]
