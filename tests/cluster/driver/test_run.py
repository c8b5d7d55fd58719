"""What a run refuses before it writes anything."""

from pathlib import Path

import pytest

from cluster.driver.pin import pin
from cluster.driver.run import STEPS, check_run
from cluster.storage import open_store
from tests.tiny import tiny


@pytest.mark.parametrize(
    "overrides, said",
    [
        ("model.denoiser=transformer model.width=20", r"model\.width is 20.*multiple of 8"),
        ("model.hidden=1023", r"model\.hidden is 1023.*multiple of 4"),
        ("model.latent=18 model.heads=2 model.multipliers=[1,1,2]", r"model\.latent is 18.*multiple of 4"),
        ("model.family=perfrdiff model.online=true model.width=500 model.heads=3", r"model\.width is 500.*multiple of 3"),
        ("model.family=perfrdiff model.online=true model.acoustic=[]", r"model\.acoustic is empty"),
        ("model.facial=[none]", r"names the stream 'none', but the dataset has no facial stream of that name"),
        ("model.init_from=[nobody]", "there is no run at"),
        ("model.init_from=[none.pth] model.multipliers=[1,2,4,8]", "there is no file"),
        (
            "evaluation.split=train",
            "split 'train' has no appropriateness matrix, so it cannot be scored; set evaluation.split to one of test",
        ),
        ("run.autoencoder=nobody", r"run\.autoencoder=nobody cannot be taken"),
    ],
)
def test_what_no_worker_could_build_is_refused_and_nothing_is_written(overrides: str, said: str, shards: Path, tmp_path: Path) -> None:
    experiment = tiny(shards, tmp_path / "store", *overrides.split())
    with pytest.raises(ValueError, match=said):
        check_run(experiment, pin(experiment, "tiny"), STEPS)
    assert not list(open_store(str(tmp_path / "store")).list())


def test_what_is_not_evaluated_needs_no_matrix(shards: Path, tmp_path: Path) -> None:
    experiment = tiny(shards, tmp_path / "store", "evaluation.split=train")
    check_run(experiment, pin(experiment, "tiny"), ["autoencoder"])
