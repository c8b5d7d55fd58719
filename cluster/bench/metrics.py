"""What the metrics cost beside the challenges' code: per pair on one core, and for a full-size set on many.

The reactions are random: knots a second apart, a straight line between them, all keyed, so any clip can be made anywhere.
"""

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from reactdiff.clip import ATTRIBUTES, FRAME_RATE
from reactdiff.data.keyed import normal
from reactdiff.metrics.agreement import Reaction, concordance
from reactdiff.metrics.dtw import laid_out, nearest
from reactdiff.metrics.official import Progress, Scores, merge, score_part
from reactdiff.metrics.partial import PartialScores
from reactdiff.metrics.synchrony import offsets

OFFICIAL_SECONDS = {"FRCorr": 2.6e-3, "FRDist": 10.1e-3, "FRSyn": 87e-3}
"""CPU time of the challenges' code on a machine like ours: per (prediction, neighbour) pair; FRSyn: per prediction."""

PREDICTIONS, FRAMES, NEIGHBOURS = 10, 750, 5
CLIPS = 1612
"""Of the challenges' test set."""

PART = 20
"""Clips of one part of the full-size set: whole groups of neighbours."""

CLIPS_TIMED = 15


@dataclass(frozen=True)
class MetricCost:
    """CPU time of one metric on one core.

    Attributes:
        metric: its name.
        neighbours: real reactions that each prediction is compared with.
        reactions: "independent", or "alike": predictions and neighbours of a clip have half of their variance in common.
        seconds: per pair, or per prediction for FRSyn; the median clip's.
    """

    metric: str
    neighbours: int
    reactions: str
    seconds: float

    @property
    def speedup(self) -> float:
        """How many times the challenges' code takes longer."""
        return OFFICIAL_SECONDS[self.metric] / self.seconds


@dataclass(frozen=True)
class FullSize:
    """A full-size set, scored.

    Attributes:
        scores: of random reactions.
        wall: seconds, making the reactions included.
        cpu: CPU seconds of the process in that time.
        making: of these, seconds of making the reactions.
        memory: the process's largest resident memory so far, bytes.
        official: CPU seconds that the challenges' code takes for FRCorr, FRDist and FRSyn over all predictions.
    """

    scores: Scores
    wall: float
    cpu: float
    making: float
    memory: int
    official: float


def pair_costs(progress: Progress) -> list[MetricCost]:
    """Measure all three with one neighbour, where no warping can be given up, and those that depend on neighbours with five."""
    cases = [(1, "independent", OFFICIAL_SECONDS), (NEIGHBOURS, "independent", ("FRCorr", "FRDist")), (NEIGHBOURS, "alike", ("FRDist",))]
    costs = []
    for number, (neighbours, reactions, metrics) in enumerate(cases):
        seconds = [_clip_seconds(clip, neighbours, reactions) for clip in range(1 + CLIPS_TIMED)][1:]  # the first one compiles
        costs += [MetricCost(metric, neighbours, reactions, float(np.median([one[metric] for one in seconds]))) for metric in metrics]
        progress(number + 1, len(cases))
    return costs


def full_size(threads: int, progress: Progress, clips: int = CLIPS) -> FullSize:
    """Score ten independent predictions of each clip against groups of five neighbours, part by part as they are made."""
    wall, cpu, making, pairs = time.perf_counter(), time.process_time(), 0.0, 0

    def parts() -> Iterator[PartialScores]:
        nonlocal making, pairs
        for start in range(0, clips, PART):
            rows = range(start, min(start + PART, clips))
            begun = time.process_time()
            pred = np.stack([_reactions("prediction", clip, PREDICTIONS) for clip in rows])
            target, speaker = (np.concatenate([_reactions(role, clip, 1) for clip in rows]) for role in ("listener", "speaker"))
            making += time.process_time() - begun
            group = np.array(rows) // NEIGHBOURS
            near = [np.flatnonzero(group == one) for one in group]
            pairs += PREDICTIONS * sum(map(len, near))
            yield score_part(pred, target, speaker, near, range(len(rows)), threads)
            progress(rows.stop, clips)

    scores = merge(parts())
    official = pairs * (OFFICIAL_SECONDS["FRCorr"] + OFFICIAL_SECONDS["FRDist"]) + clips * PREDICTIONS * OFFICIAL_SECONDS["FRSyn"]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return FullSize(scores, time.perf_counter() - wall, time.process_time() - cpu, making, memory, official)


def _clip_seconds(clip: int, neighbours: int, reactions: str) -> dict[str, float]:
    """CPU time of each metric for one clip: per pair, or per prediction for FRSyn."""
    pred, real, speaker = (
        _reactions(role, clip, count) for role, count in (("prediction", PREDICTIONS), ("listener", neighbours), ("speaker", 1))
    )
    if reactions == "alike":
        pred, real = ((one + _reactions("common", clip, 1)) / 2 for one in (pred, real))
    times = [time.thread_time()]
    predictions, listeners = Reaction.of(pred), [Reaction.of(one) for one in real]
    concordance(predictions, listeners)
    times.append(time.thread_time())
    laid = [laid_out(listener.series) for listener in listeners]
    for one in laid_out(predictions.series[..., ::-1]):
        nearest(one, laid, FRAMES)
    times.append(time.thread_time())
    offsets(predictions.series, Reaction.of(speaker[0]).series)
    times.append(time.thread_time())
    correlating, warping, lagging = np.diff(times) / PREDICTIONS
    return {"FRCorr": correlating / neighbours, "FRDist": warping / neighbours, "FRSyn": lagging}


def _reactions(role: str, clip: int, count: int) -> np.ndarray:
    """(count, frames, 25) float32 in (0, 1): uncorrelated normal knots a second apart, joined by straight lines."""
    knots = normal((count, FRAMES // FRAME_RATE + 1, len(ATTRIBUTES)), "bench", role, clip)
    place = np.arange(FRAMES, dtype=np.float32) / FRAME_RATE
    before = place.astype(int)
    share = (place - before)[:, None]
    reactions = 1 / (1 + np.exp(-(knots[:, before] * (1 - share) + knots[:, before + 1] * share)))
    return np.ascontiguousarray(reactions, dtype=np.float32)  # as a model's are
