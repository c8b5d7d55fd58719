"""Looking at clips of `val` while a model is trained."""

from pathlib import Path

import pytest

from cluster.config.schema import Experiment
from cluster.data.manifest import load_manifest
from cluster.evaluation.validation import ValidationClips
from cluster.runs import checkpoint
from cluster.runtime.ray_cluster import Resources
from cluster.storage import open_store
from cluster.telemetry.metrics_log import read_rows, validation_name
from tests.cluster.support.ranks import on_ranks
from tests.cluster.support.training import parts, train_here
from tests.tiny import make_shards, tiny

FAMILY = (
    *("model.family=trans-vae", "model.width=32", "model.layers=1", "diffusion.prediction=epsilon", "diffusion.sampling_steps=20"),
    *("optim.epochs=2", "run.keep=9"),
)


@pytest.fixture(scope="module")
def clips(local_ray: Resources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("watched"), "train=6", "val=4", per_shard=3, frames=50)


def rows(experiment: Experiment, folder: Path, ranks: int) -> list[dict[str, float]]:
    manifest = load_manifest(open_store(experiment.data.url)).hash
    watched = ValidationClips(open_store(experiment.data.url), manifest, None) if experiment.evaluation.watch else None
    on_ranks(ranks, train_here, experiment, str(folder), 1, "autoencoder", watched)
    return read_rows(open_store(str(folder)), validation_name("autoencoder"))


def test_each_checkpoint_is_scored_alike_by_any_number_of_ranks_and_training_does_not_notice(clips: Path, tmp_path: Path) -> None:
    watching, not_watching = (tiny(clips, tmp_path, *FAMILY, f"evaluation.watch={count}") for count in (3, 0))
    alone = rows(watching, tmp_path / "one", 1)
    assert [row["progress"] for row in alone] == [12], "the end is scored by the evaluation, every other epoch here"
    assert rows(not_watching, tmp_path / "none", 1) == []
    assert parts(tmp_path / "one") == parts(tmp_path / "none"), "the weights are those of a run that was not watched"
    together = rows(watching, tmp_path / "two", 2)
    names = [checkpoint.list_checkpoints(open_store(str(tmp_path / folder)), "autoencoder") for folder in ("one", "two")]
    assert names[0] == names[1]
    assert together[0]["FRDist"] == pytest.approx(alone[0]["FRDist"], rel=1e-3) and alone[0]["FRDist"] > 0
