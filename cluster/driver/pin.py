"""Which run an experiment is: its name, its folder, the state of the dataset it is pinned to, and its `config.yaml`."""

from dataclasses import dataclass

import yaml

from cluster.config.identity import differing, digest, ends, identity, name_fields
from cluster.config.loading import ConfigError, build, to_yaml
from cluster.config.schema import Experiment
from cluster.data.manifest import Manifest, load_manifest
from cluster.runs.checkpoint import list_checkpoints
from cluster.runs.saved import SavedRun
from cluster.runs.state import assert_newest_life, read_state
from cluster.storage import AlreadyExists, NotFound, Stale, Store, open_store

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Pinned:
    """A run, and the dataset state it is pinned to.

    Attributes:
        name: of the run.
        home: the store it lies in, with the latents of all runs.
        store: its folder, below `home`.
        dataset: the dataset it is trained on.
        manifest: the state of it.
        fresh: whether the run was never started.
    """

    name: str
    home: Store
    store: Store
    dataset: Store
    manifest: Manifest
    fresh: bool

    def saved(self, experiment: Experiment) -> SavedRun:
        """The run with what its stages have left so far, under the name it has."""
        named_run = experiment.run.model_copy(update={"name": self.name})
        return SavedRun(experiment.model_copy(update={"run": named_run}), self.home, self.store, self.dataset, self.manifest)


def pin(experiment: Experiment, config_name: str) -> Pinned:
    """Find the run an experiment stands for, or the place where it will be; writes nothing.

    Raises:
        ConfigError: if the name belongs to a run of another identity, or the end would shrink.
        StorageError: if the dataset or the store cannot be read.
    """
    dataset, home = open_store(experiment.data.url), open_store(experiment.run.store)
    current = load_manifest(dataset, experiment.data.manifest)
    name = experiment.run.name or run_name(experiment, config_name, current.identity)
    store = home.at(f"runs/{name}")
    try:
        before = build(yaml.safe_load(store.read(CONFIG)), f"{store.url}/{CONFIG}")
    except NotFound:
        return Pinned(name, home, store, dataset, current, fresh=True)
    _assert_same(name, before, experiment)
    was, now = (one.optim.epochs["autoencoder"] for one in (before, experiment))
    if now > was and list_checkpoints(store, "diffusion"):
        raise ConfigError(
            f"optim.epochs.autoencoder is {now:g}, but stage diffusion of run {name} was trained on the latents of {was:g} epochs: "
            "grow optim.epochs.diffusion alone, or choose another run.name"
        )
    state = read_state(store)
    if state is None:
        return Pinned(name, home, store, dataset, current, fresh=False)
    if state.dataset != current.identity:
        raise ConfigError(
            f"run {name} is pinned to dataset {state.dataset}, but data.url={experiment.data.url} holds dataset {current.identity}: "
            "point data.url at the run's dataset, or choose another run.name"
        )
    return Pinned(name, home, store, dataset, load_manifest(dataset, state.manifest), fresh=False)


def write_config(experiment: Experiment, pinned: Pinned, life: int) -> None:
    """Create the run's `config.yaml`, or replace it by this life's: of lives that begin at once under one name one decides what it is.

    It names the life, so that an older one, which may have stood still meanwhile, cannot put its own back.

    Raises:
        ConfigError: if another identity was there first.
        Superseded: if a newer life has begun.
    """
    store, data = pinned.store, f"# written by life {life}\n{to_yaml(experiment)}".encode()
    while True:
        try:
            now, etag = store.get(CONFIG)
            _assert_same(pinned.name, build(yaml.safe_load(now), f"{store.url}/{CONFIG}"), experiment)
        except NotFound:
            etag = ""
        assert_newest_life(store, life)
        try:
            if etag:
                store.replace(CONFIG, data, etag)
            else:
                store.create(CONFIG, data)
            return
        except (AlreadyExists, Stale):
            continue


def run_name(experiment: Experiment, config_name: str, dataset: str) -> str:
    """The name of a run that was given none: of the configuration's file, and of what is computed on which dataset."""
    return f"{config_name}-{digest([name_fields(experiment), dataset])[:8]}"


def stage_end(experiment: Experiment, stage: str, clips: Manifest) -> int:
    """Progress at the end of a stage: epochs times the items of the training split."""
    return int(experiment.optim.epochs[stage] * 2 * int(clips.counts(experiment.data.split).sum()))


def _assert_same(name: str, before: Experiment, now: Experiment) -> None:
    if fields := differing(identity(before), now):
        raise ConfigError(
            f"run {name} exists with another identity; differing: {', '.join(fields)}. Choose another run.name, or set these back"
        )
    for key, stages in ends(now).items():
        for stage, end in stages.items():
            if end < ends(before)[key][stage]:
                was = ends(before)[key][stage]
                raise ConfigError(f"{key}.{stage} is {end}, but run {name} was started with {was}; the end of a run may only grow")
