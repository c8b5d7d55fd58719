"""A run may take the finished autoencoder of another one, whole, instead of training its own (`run.autoencoder`)."""

from cluster.config.loading import ConfigError
from cluster.config.schema import Experiment
from cluster.data.manifest import Manifest
from cluster.runs.export import Export, copy_export, load_weights, newest_export
from cluster.runs.saved import SavedRun, open_run
from cluster.storage import NotFound, StorageError, Store
from reactdiff.config import ENCODING, Model
from reactdiff.data.sample import StreamSpec

STAGE = "autoencoder"


def check_pretrained(experiment: Experiment, clips: Manifest, store: Store) -> None:
    """Refuse an autoencoder that cannot be taken, before any work; one that the run in this folder has taken is not asked for again.

    Raises:
        ConfigError: if there is no such run, it has not finished its autoencoder, or that is not the one the experiment describes.
    """
    if experiment.run.autoencoder and _taken(store) is None:
        _parent(experiment, clips)


def take_pretrained(experiment: Experiment, clips: Manifest, store: Store) -> Export:
    """Take over the autoencoder, weights and all, unless that is done: what a run began with it keeps, whatever becomes of the parent.

    Raises:
        ConfigError: as `check_pretrained`.
    """
    if (taken := _taken(store)) is not None:
        return taken
    parent, export = _parent(experiment, clips)
    load_weights(parent.store, export)  # verified
    copy_export(export, parent.store, store)
    return export


def _taken(store: Store) -> Export | None:
    try:
        return newest_export(store, STAGE)
    except NotFound:
        return None


def _parent(experiment: Experiment, clips: Manifest) -> tuple[SavedRun, Export]:
    where = experiment.run.autoencoder
    try:
        parent = open_run(where, experiment.run.store)
        export = parent.export(STAGE)
    except (ValueError, StorageError) as error:
        raise ConfigError(f"run.autoencoder={where} cannot be taken: {error}") from error
    ours, theirs = experiment.model.model_dump(mode="json"), Model.model_validate(export.model).model_dump(mode="json")
    differing = [f"model.{key} (there {theirs[key]}, here {ours[key]})" for key in ENCODING if ours[key] != theirs[key]]
    there = {spec.name: spec for spec in (StreamSpec(**values) for values in export.streams)}
    differing += [
        f"stream {spec.name} of the dataset (there {there[spec.name].width}, here {spec.width})"
        for spec in clips.stream_specs
        if spec.name in there and spec != there[spec.name]
    ]
    if differing:
        raise ConfigError(f"run.autoencoder={where} has another autoencoder than this experiment; differing: {', '.join(differing)}")
    return parent, export
