"""A run that takes the autoencoder of another."""

from pathlib import Path

import pytest

from cluster.experiment import ConfigError
from cluster.export import adopt, load_weights, newest_export
from cluster.run import parent
from cluster.storage import StorageError, open_store
from tests.tiny import tiny


def test_what_is_taken_is_whole_verified_and_the_same(finished: Path, tmp_path: Path) -> None:
    source, store = open_store(str(finished)), open_store(str(tmp_path / "run"))
    export = newest_export(source, "autoencoder")
    for _ in range(2):  # a later life finds it there
        adopt(export, source, store)
    assert newest_export(store, "autoencoder") == export
    ours, theirs = load_weights(store, export), load_weights(source, export)
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_damaged_weights_are_not_taken(finished: Path, tmp_path: Path) -> None:
    source, copy, store = open_store(str(finished)), open_store(str(tmp_path / "copy")), open_store(str(tmp_path / "run"))
    export = newest_export(source, "autoencoder")
    key = f"exports/autoencoder/{export.hash}.safetensors"
    data = bytearray(source.read(key))
    data[-1] ^= 1
    copy.put(key, bytes(data))
    with pytest.raises(StorageError, match="it is damaged"):
        adopt(export, copy, store)
    assert not list(store.list("exports/"))


def test_a_parent_that_is_none_or_has_another_autoencoder_is_refused(finished: Path, shards: Path) -> None:
    store = finished.parent.parent
    assert parent(tiny(shards, store, "run.autoencoder=tiny", "model.channels=64", "diffusion.prediction=v")).store.url == str(finished)
    with pytest.raises(ConfigError, match=r"tiny has another autoencoder .*differing: model\.hidden \(there 32, here 64\)"):
        parent(tiny(shards, store, "run.autoencoder=tiny", "model.hidden=64"))
    with pytest.raises(ConfigError, match=r"run\.autoencoder=none cannot be taken: there is no run at"):
        parent(tiny(shards, store, "run.autoencoder=none"))
