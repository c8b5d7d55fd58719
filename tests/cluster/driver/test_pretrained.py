"""A run that takes the autoencoder of another."""

import shutil
from pathlib import Path

import pytest

from cluster.config.loading import ConfigError
from cluster.data.manifest import load_manifest
from cluster.driver.pretrained import check_pretrained, take_pretrained
from cluster.runs.export import load_weights, newest_export
from cluster.storage import StorageError, open_store
from tests.tiny import tiny


@pytest.fixture
def child(finished: Path, shards: Path, tmp_path: Path):
    """Makes the arguments of `take_pretrained` for a run that takes the autoencoder of the finished one."""

    def arguments(*overrides: str, store: Path | None = None):
        experiment = tiny(shards, store or finished.parent.parent, "run.autoencoder=tiny", *overrides)
        return experiment, load_manifest(open_store(str(shards))), open_store(str(tmp_path / "run"))

    return arguments


def test_what_is_taken_is_whole_and_stays_when_the_parent_is_gone(finished: Path, child, tmp_path: Path) -> None:
    shutil.copytree(finished.parent.parent, tmp_path / "store")
    given = child("diffusion.prediction=v", store=tmp_path / "store")
    export = take_pretrained(*given)
    shutil.rmtree(tmp_path / "store")
    check_pretrained(*given)
    assert take_pretrained(*given) == export == newest_export(given[2], "autoencoder")
    ours, theirs = load_weights(given[2], export), load_weights(open_store(str(finished)), export)
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_damaged_weights_are_not_taken(finished: Path, child, tmp_path: Path) -> None:
    shutil.copytree(finished.parent.parent, tmp_path / "store")
    given, parent = child(store=tmp_path / "store"), open_store(str(tmp_path / "store/runs/tiny"))
    key = f"exports/autoencoder/{newest_export(parent, 'autoencoder').hash}.safetensors"
    data = bytearray(parent.read(key))
    data[-1] ^= 1
    parent.put(key, bytes(data))
    with pytest.raises(StorageError, match="it is damaged"):
        take_pretrained(*given)
    assert not list(given[2].list("exports/"))


def test_a_parent_that_is_none_or_has_another_autoencoder_is_refused_before_any_work(child, tmp_path: Path) -> None:
    check_pretrained(*child("model.channels=64", "diffusion.prediction=v"))
    with pytest.raises(ConfigError, match=r"tiny has another autoencoder .*differing: model\.hidden \(there 32, here 64\)"):
        check_pretrained(*child("model.hidden=64"))
    with pytest.raises(ConfigError, match=r"run\.autoencoder=tiny cannot be taken: there is no run at"):
        check_pretrained(*child(store=tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"run\.autoencoder would take the only stage of model\.family=trans-vae"):
        child("model.family=trans-vae")
