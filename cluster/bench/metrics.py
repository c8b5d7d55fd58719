"""What the metrics cost beside the challenges' way to them (`bench/challenge.py`), on the same arrays in the same process.

The reactions are random: knots a second apart, a straight line between them, all keyed, so any clip can be made anywhere.
"""

import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from cluster.bench.challenge import CHALLENGE
from reactdiff.clip import ATTRIBUTES, FRAME_RATE
from reactdiff.data.keyed import normal
from reactdiff.metrics.agreement import Reaction, concordance
from reactdiff.metrics.dtw import laid_out, nearest
from reactdiff.metrics.official import Progress, Scores, merge, score, score_part
from reactdiff.metrics.partial import PartialScores
from reactdiff.metrics.synchrony import offsets

PREDICTIONS, FRAMES, NEIGHBOURS = 10, 750, 5
CLIPS = 1612
"""Of the challenges' test set."""

PART = 20
"""Clips of one part of the full-size set: whole groups of neighbours."""

CLIPS_TIMED = 15
"""Clips that costs of pairs are medians of; also a set that both ways score whole."""

TOLERANCE = 1e-6
"""How far both ways may be apart, relative: what docs/metrics.md promises."""

CASES = (
    (1, "independent", ("FRCorr", "FRDist", "FRSyn")),
    (NEIGHBOURS, "independent", ("FRCorr", "FRDist")),
    (NEIGHBOURS, "alike", ("FRDist",)),
)
"""Neighbours, kind of reactions and metrics: with one neighbour no warping can be given up, and FRSyn asks for none."""

BY_PAIR = ("FRCorr", "FRDist")
"""Metrics whose cost grows with the pairs of predictions and neighbours."""


@dataclass(frozen=True)
class MetricCost:
    """CPU time of one metric on one core, both ways.

    Attributes:
        metric: its name.
        neighbours: real reactions that each prediction is compared with.
        reactions: "independent", or "alike": predictions and neighbours of a clip have half of their variance in common.
        ours: seconds per pair, or per prediction for FRSyn; the median clip's.
        challenge: the same of the challenges' way.
    """

    metric: str
    neighbours: int
    reactions: str
    ours: float
    challenge: float


@dataclass(frozen=True)
class SetCost:
    """CPU time of all six metrics of one set, both ways.

    Attributes:
        values: each metric of ours and by the challenges' way.
        ours: seconds of `score`, with everything else it computes.
        challenge: seconds of each metric.
    """

    values: dict[str, tuple[float, float]]
    ours: float
    challenge: dict[str, float]


@dataclass(frozen=True)
class FullSize:
    """A full-size set, scored.

    Attributes:
        scores: of random reactions.
        wall: seconds, making the reactions included.
        cpu: CPU seconds of the process in that time.
        making: of these, seconds of making the reactions.
        memory: the process's largest resident memory until then, bytes.
        part: CPU seconds of the challenges' way to the first part, without FRDvs, whose cost grows with the square of the clips.
        challenge: the same scaled to all clips: FRCorr and FRDist by their pairs, the others by the clips.
    """

    scores: Scores
    wall: float
    cpu: float
    making: float
    memory: int
    part: float
    challenge: float


def pair_costs(progress: Progress, clips: int = CLIPS_TIMED) -> list[MetricCost]:
    """Measure the three that cost most, clip by clip, both ways in turns.

    Raises:
        AssertionError: if both ways differ.
    """
    costs = []
    for number, (neighbours, reactions, metrics) in enumerate(CASES):
        each = [_clip_costs(clip, neighbours, reactions, metrics) for clip in range(1 + clips)][1:]  # the first one compiles
        for metric in metrics:
            ours, challenge = (median(one[metric][way] for one in each) for way in (0, 1))
            costs.append(MetricCost(metric, neighbours, reactions, ours, challenge))
        progress(number + 1, len(CASES))
    return costs


def set_cost(progress: Progress, clips: int = CLIPS_TIMED) -> SetCost:
    """Score a set of independent reactions whole, both ways; the challenges' has been compiled before (`pair_costs`).

    Raises:
        AssertionError: if both ways differ.
    """
    pred, target, speaker, near = _clips(range(clips))
    matrix = np.stack([np.isin(range(clips), others) for others in near])
    score(pred[:2], target[:2], speaker[:2], matrix[:2, :2])
    begun = time.process_time()
    scores = score(pred, target, speaker, matrix)
    ours = time.process_time() - begun
    values, seconds = {}, {}
    for number, (metric, computed) in enumerate(CHALLENGE.items()):
        begun = time.process_time()
        theirs = computed(pred, target, speaker, near)
        seconds[metric] = time.process_time() - begun
        values[metric] = scores.official[metric], theirs
        _assert_same(metric, *values[metric])
        progress(number + 1, len(CHALLENGE))
    return SetCost(values, ours, seconds)


def full_size(threads: int, progress: Progress, clips: int = CLIPS) -> FullSize:
    """Score ten independent predictions of each clip against groups of five neighbours, part by part as they are made."""
    wall, cpu, making, pairs = time.perf_counter(), time.process_time(), 0.0, 0
    first: list[PartialScores] = []

    def parts() -> Iterator[PartialScores]:
        nonlocal making, pairs
        for start in range(0, clips, PART):
            begun = time.process_time()
            rows = range(start, min(start + PART, clips))
            pred, target, speaker, near = _clips(rows)
            making += time.process_time() - begun
            pairs += _pairs(near)
            part = score_part(pred, target, speaker, near, range(len(rows)), threads)
            first[:] = first or [part]
            yield part
            progress(rows.stop, clips)

    scores = merge(parts())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds, whole = _part_by_the_challenges_way(range(min(PART, clips)), merge(first).official, pairs, clips)
    return FullSize(scores, wall, cpu, making, memory, seconds, whole)


def _part_by_the_challenges_way(rows: range, ours: Mapping[str, float], pairs: int, clips: int) -> tuple[float, float]:
    """CPU seconds of a part, and scaled to so many pairs and clips."""
    pred, target, speaker, near = _clips(rows)
    part = whole = 0.0
    for metric, computed in CHALLENGE.items():
        if metric != "FRDvs":
            begun = time.process_time()
            _assert_same(metric, ours[metric], computed(pred, target, speaker, near))
            seconds = time.process_time() - begun
            part += seconds
            whole += seconds * (pairs / _pairs(near) if metric in BY_PAIR else clips / len(rows))
    return part, whole


def _clip_costs(clip: int, neighbours: int, reactions: str, metrics: Sequence[str]) -> dict[str, tuple[float, float]]:
    """CPU time of each metric for one clip, ours and the challenges': per pair, or per prediction for FRSyn."""
    pred, real, speaker = (
        _reactions(role, clip, count) for role, count in (("prediction", PREDICTIONS), ("listener", neighbours), ("speaker", 1))
    )
    if reactions == "alike":
        pred, real = ((one + _reactions("common", clip, 1)) / 2 for one in (pred, real))
    times = [time.thread_time()]
    predictions, listeners = Reaction.of(pred), [Reaction.of(one) for one in real]
    agreement = concordance(predictions, listeners).mean(axis=2).max(axis=1).sum()
    times.append(time.thread_time())
    laid = [laid_out(listener.series) for listener in listeners]
    distance = sum(nearest(one, laid, FRAMES) for one in laid_out(predictions.series[..., ::-1]))
    times.append(time.thread_time())
    lags = offsets(predictions.series, Reaction.of(speaker[0]).series).official
    times.append(time.thread_time())
    values = {"FRCorr": float(agreement), "FRDist": distance, "FRSyn": float(lags[0])}
    pairs = PREDICTIONS * neighbours
    ours = dict(zip(values, np.diff(times) / [pairs, pairs, PREDICTIONS], strict=True))
    theirs = {}
    for metric in metrics:
        begun = time.thread_time()
        value = CHALLENGE[metric](pred[None], real, speaker, [np.arange(neighbours)])
        theirs[metric] = (time.thread_time() - begun) / (pairs if metric in BY_PAIR else 1)  # FRSyn is that of the first prediction
        _assert_same(metric, values[metric], value)
    return {metric: (ours[metric], theirs[metric]) for metric in metrics}


def _assert_same(metric: str, ours: float, theirs: float) -> None:
    assert math.isclose(ours, theirs, rel_tol=TOLERANCE), f"{metric} is {ours} here and {theirs} by the challenges' way: not the same work"


def _pairs(near: Sequence[np.ndarray]) -> int:
    return PREDICTIONS * sum(map(len, near))


def _clips(rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """Predictions, real reactions and speakers of some clips, and each clip's group of neighbours among them."""
    pred = np.stack([_reactions("prediction", clip, PREDICTIONS) for clip in rows])
    target, speaker = (np.concatenate([_reactions(role, clip, 1) for clip in rows]) for role in ("listener", "speaker"))
    group = np.array(rows) // NEIGHBOURS
    return pred, target, speaker, [np.flatnonzero(group == one) for one in group]


def _reactions(role: str, clip: int, count: int) -> np.ndarray:
    """(count, frames, 25) float32 in (0, 1): uncorrelated normal knots a second apart, joined by straight lines."""
    knots = normal((count, FRAMES // FRAME_RATE + 1, len(ATTRIBUTES)), "bench", role, clip)
    place = np.arange(FRAMES, dtype=np.float32) / FRAME_RATE
    before = place.astype(int)
    share = (place - before)[:, None]
    reactions = 1 / (1 + np.exp(-(knots[:, before] * (1 - share) + knots[:, before + 1] * share)))
    return np.ascontiguousarray(reactions, dtype=np.float32)  # as a model's are
