"""Rows that need no models; tests/jobs/test_train.py and tests/jobs/test_evaluate.py see all of them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.config.loading import load
from cluster.data.shards import encode_npy
from cluster.evaluation.rows import CUT, REAL_PAST, predictions_file, rows_of
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
