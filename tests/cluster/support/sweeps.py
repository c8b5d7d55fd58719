"""A sweep of four trials, of which nothing is run."""

import math
from pathlib import Path
from typing import Any

from cluster.data.manifest import File, Manifest, Split, publish
from cluster.storage import open_store
from cluster.studies.ledger import Ledger
from cluster.studies.search import Search
from cluster.studies.sweep import OpenSweep, Sweep


def rung(progress: int, worse: float) -> dict[str, Any]:
    """What a trial measured that is so much worse."""
    errors = [[0.1 + item / 10 + worse + 1e-4 * (item % 3) * worse, 0.02] for item in range(16)]
    return {"progress": progress, "levels": [[0.0, -0.1234], [3.0, 2.71]], "errors": errors}


def stopped(ledger: Ledger, number: int) -> bool:
    """Whether it was decided that a trial is to stop, as its driver sees it: in the store, at one of two rungs."""
    choices = [ledger.decided(number, rung) for rung in range(2)]
    return any(choice and not choice.goes_on for choice in choices)


def search_in(tmp_path: Path, **keys: Any) -> Search:
    """With two rungs, unless keys of its file say otherwise."""
    splits = {"train": Split(), "val": Split(appropriateness=File(file="val/matrix.npy", hash="0" * 32))}
    publish(open_store(f"{tmp_path}/shards"), Manifest(kind="clips", frames=100, streams=[], targets={}, members=[], splits=splits))
    space = {
        "model.denoiser": ["unet", "transformer"],
        "model.layers": {"choice": [2, 4], "when": {"model.denoiser": "transformer"}},
    }
    given = {"name": "shown", "space": space, "metrics": {"FRDist": "min"}, "halving": {"rungs": [10, 20], "clips": 8}} | keys
    return Search(OpenSweep(Sweep.model_validate(given), [f"data.url={tmp_path}/shards", f"run.store={tmp_path}/store"]))


def search_with_a_diverged_trial(tmp_path: Path) -> Search:
    """Nine trials that have measured the first rung: the schedule matters, dropout does not, and number 5 is not finite in one item."""
    space = {"diffusion.schedule": ["cosine", "linear", "karras"], "diffusion.condition_dropout": [0.0, 0.1, 0.2]}
    search = search_in(tmp_path, space=space)
    for number in range(9):
        measured = rung(12, 0.05 * (number // 3))
        if number == 5:
            measured["errors"][3][0] = math.nan
        search.ledger.enter_rung(number, 0, measured)
    search.refresh()
    return search
