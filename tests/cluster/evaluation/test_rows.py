"""Rows that need no models; tests/jobs/test_train.py and tests/jobs/test_evaluate.py see all of them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.config.loading import load
from cluster.data.shards import encode_npy
from cluster.evaluation.plan import REVISIONS
from cluster.evaluation.rows import CUT, RANDOM, REAL_PAST, WRONG, RowInputs, predictions_file, rows_of
from cluster.storage import open_store
from reactdiff.clip import AU


def test_units_are_cut_in_what_was_drawn_for_the_model_s_own_row_or_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan: Any = SimpleNamespace(run=open_store(str(tmp_path)), file=lambda row, start: f"parts/{row}-{start}")
    kept, again = np.random.default_rng(0).random((2, 8, 2, 50, 25), dtype=np.float32)
    plan.run.put(predictions_file(plan, 8), encode_npy(kept))
    monkeypatch.setattr("cluster.evaluation.rows._model", lambda *_: again)
    cut = rows_of(load(None), {})[CUT]
    for start, drawn in ((8, kept), (16, again)):
        found = cut(SimpleNamespace(plan=plan), range(start, start + 8))  # type: ignore[arg-type]
        assert np.array_equal(found[..., AU], drawn[..., AU] > 0.5) and found.dtype == np.float32
        assert np.array_equal(found[..., AU.stop :], drawn[..., AU.stop :]), "valence, arousal and expressions are as they were"


@pytest.mark.parametrize(("settings", "there"), [("model.denoiser=transformer model.online=true", True), ("model.online=true", False)])
def test_only_an_online_transformer_with_baselines_is_drawn_under_the_real_past(settings: str, there: bool) -> None:
    assert (REAL_PAST in rows_of(load(None, settings.split()), {})) is there
    assert REAL_PAST not in rows_of(load(None, [*settings.split(), "evaluation.baselines=false"]), {})


def test_neither_the_wrong_speaker_nor_a_random_listener_is_of_the_same_script_in_either_role(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = np.repeat([0, 1, 2], 2)
    inputs: Any = RowInputs.__new__(RowInputs)  # as one that has opened a dataset of six clips
    inputs.plan = SimpleNamespace(experiment=load(None), predictions=30)
    inputs.clips, inputs.reader = 6, SimpleNamespace(key=lambda clip: f"clip {clip}")
    inputs.matrix = np.kron(np.eye(2, dtype=bool), scripts[:, None] == scripts)  # who suits whom, each direction by itself
    monkeypatch.setattr(RowInputs, "listener", lambda _, item: np.full((5, 25), item))
    monkeypatch.setattr(RowInputs, "react", lambda _, reactor, speakers, items: np.array(speakers))
    monkeypatch.setattr(RowInputs, "trained", None)
    rows = rows_of(load(None), {})
    for item in range(12):
        drawn = rows[RANDOM](inputs, range(item, item + 1))[0, :, 0, 0].astype(int)
        for other in (*drawn, *rows[WRONG](inputs, range(item, item + 1))):
            assert scripts[other % 6] != scripts[item % 6]
        assert len(set(drawn // 6)) == 2, "of both directions"


def test_only_rows_that_there_are_have_revisions() -> None:
    assert REVISIONS.keys() <= rows_of(load(None), {}).keys()
