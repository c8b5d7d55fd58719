"""The gate: may a candidate replace the champion? The same frozen clips for both, and a rule that is written down beforehand."""

import json
from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from cluster.config.spec import known_metric
from cluster.data.manifest import HASH_DIGITS, Manifest, load_appropriateness, read_file
from cluster.evaluation.ground_truth import of_first_clips
from cluster.storage import Store
from reactdiff.config import Branch

SPLIT = "gate"
"""The split that decides promotions, and nothing else."""

Metrics = Mapping[str, float | None]
"""Metric -> score, None where it is undefined."""


class GateError(ValueError):
    """The gate cannot judge: what is wrong with its clips, and the way out."""


class Guard(Branch):
    """How much worse another metric may get."""

    mode: Literal["max", "min"] = Field(description="Whether more or less of it is better.")
    percent: float = Field(ge=0, description="By how much of the champion's score the candidate's may be worse.")


class Rule(Branch):
    """When a candidate is better than the champion."""

    metric: str = Field("FRCorr", description="Metric that must get better.")
    mode: Literal["max", "min"] = Field("max", description="Whether more or less of it is better.")
    margin: float = Field(0.0, ge=0, description="Difference that must be exceeded.")
    guards: dict[str, Guard] = Field({}, description="Other metrics, and how much worse each may get.")

    _metric = field_validator("metric")(known_metric)

    @field_validator("guards")
    @classmethod
    def _known(cls, guards: dict[str, Guard]) -> dict[str, Guard]:
        for name in guards:
            known_metric(name)
        return guards


def judge(rule: Rule, candidate: Metrics, champion: Metrics | None) -> tuple[bool, str]:
    """Whether the candidate is better, and why, in a sentence; without a champion it is if its metric is defined."""
    new, old = candidate[rule.metric], champion[rule.metric] if champion else None
    if new is None:
        return False, f"{rule.metric} of the candidate is undefined"
    if champion is None:
        return True, f"there was no champion; {rule.metric} is {new:.4f}"
    if old is None:
        return True, f"{rule.metric} is {new:.4f}, and undefined for the champion"
    gain = new - old if rule.mode == "max" else old - new
    sentence = f"{rule.metric} is {new:.4f} against {old:.4f}, a gain of {gain:.4f} where more than {rule.margin:g} is asked for"
    worse = [text for name, guard in rule.guards.items() if (text := _breach(name, guard, candidate[name], champion[name]))]
    return gain > rule.margin and not worse, "; ".join([sentence, *worse])


def _breach(name: str, guard: Guard, new: float | None, old: float | None) -> str:
    """What is wrong with a guarded metric, nothing if all is well."""
    if old is None:
        return ""
    if new is None:
        return f"{name} is undefined, but not for the champion"
    loss = old - new if guard.mode == "max" else new - old
    if loss <= guard.percent / 100 * abs(old):
        return ""
    return f"{name} is {new:.4f} against {old:.4f}, worse by more than {guard.percent:g} %"


def frozen_clips(store: Store, candidate: Manifest, champion: Manifest | None, train: str) -> int:
    """How many of the gate's clips, the first ones, both models can be judged on.

    Args:
        store: the dataset.
        candidate: the state the candidate is trained on.
        champion: the state the champion was trained on; its gate clips are the first of the candidate's.
        train: the split that is trained on.

    Raises:
        GateError: if there is no gate, it is not the one the champion was judged on, or its subjects are trained on.
    """
    if SPLIT not in candidate.splits or (part := candidate.splits[SPLIT]).appropriateness is None:
        raise GateError(
            f"the dataset at {store.url} has no split {SPLIT} with an appropriateness matrix, so no candidate can be judged: "
            f"add {SPLIT}.csv to the tree and prepare it again"
        )
    _assert_disjoint(store, candidate, train)
    clips = sum(part.shards.clips)
    if champion is None or SPLIT not in champion.splits:
        return clips
    before, where = champion.splits[SPLIT].shards, f"split {SPLIT} of {store.url}"
    count, same = sum(before.clips), len(before)
    if part.shards.clips[:same] != before.clips or part.shards.tar[: same * HASH_DIGITS] != before.tar:
        raise GateError(f"{where} does not begin with the clips the champion was judged on: give this model another name")
    now, then = (load_appropriateness(store, manifest, SPLIT) for manifest in (candidate, champion))
    assert now is not None and then is not None
    if not np.array_equal(of_first_clips(now, count), of_first_clips(then, count)):
        raise GateError(f"{where} has another appropriateness matrix than the champion was judged by: restore it in the tree")
    return count


def _assert_disjoint(store: Store, manifest: Manifest, train: str) -> None:
    """Nobody who is seen in the gate's clips is trained on."""
    seen = {}
    for split in (SPLIT, train):
        file = manifest.split(split).subjects
        if file is None:
            raise GateError(
                f"the dataset at {store.url} does not tell who is seen in the clips of split {split}, so it cannot be known whether "
                f"{SPLIT} and {train} share a person: prepare it from a tree whose paths name persons"
            )
        names = json.loads(read_file(store, file))
        seen[split] = {name for persons in names.values() for name in persons}
    if both := sorted(seen[SPLIT] & seen[train]):
        raise GateError(
            f"{len(both)} persons are in both {SPLIT} and {train} of {store.url}, for example {both[0]}: "
            f"a model would be judged on whom it knows; move their clips out of {train}"
        )
