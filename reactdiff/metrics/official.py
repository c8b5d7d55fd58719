"""The official metrics of the REACT 2023 and 2024 challenges, their repaired twins, and what they cannot tell.

A split is scored whole with `score`, or in parts, anywhere and in any order, with `score_part` and `merge`: the same
numbers. Definitions, and what is wrong with the official ones: docs/metrics.md.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from reactdiff.clip import ATTRIBUTES, MOUTH
from reactdiff.metrics.agreement import Reaction, concordance
from reactdiff.metrics.arrays import Targets, check_part, check_whole
from reactdiff.metrics.compiled import compiling
from reactdiff.metrics.dtw import FRAMES, laid_out, nearest
from reactdiff.metrics.energy import energy_scores
from reactdiff.metrics.frechet import Moments, frechet
from reactdiff.metrics.intervals import intervals
from reactdiff.metrics.partial import PER_CLIP, ROUGHNESS, PartialScores, means_to_metrics, total
from reactdiff.metrics.roughness import at_seams, frame_steps
from reactdiff.metrics.synchrony import offsets

OFFICIAL = ("FRCorr", "FRDist", "FRDiv", "FRVar", "FRDvs", "FRSyn")
REPAIRED = ("FRCorr_per_prediction", "FRDist_per_prediction", "FRSyn_varying")
EXTRA = ("EnergyScore", "EnergyScore_frame", *ROUGHNESS, "FRCorr_of_mean", "FRCorr_no_mouth", "FrechetAttributes")
NOT_MOUTH = [attribute for attribute in range(len(ATTRIBUTES)) if attribute not in MOUTH]

Progress = Callable[[int, int], None]
"""Called with (clips done, clips in all) after each clip."""


@dataclass(frozen=True)
class Scores:
    """The metrics of one set of predictions; NaN where a metric is undefined.

    Attributes:
        official: the names of `OFFICIAL`, computed as the challenge's code does.
        repaired: the names of `REPAIRED`: FRCorr and FRDist of one prediction instead of the sum over all, and FRSyn over
            all predictions and only those attributes that vary.
        extra: the names of `EXTRA`, metrics of our own: energy scores (`reactdiff.metrics.energy`), frame steps divided by the real
            ones (`reactdiff.metrics.roughness`), FRCorr of the mean of the predictions, as if each of them were it, FRCorr without the
            mouth, and the Frechet distance between the frames of all predictions and of the same clips' real reactions, by their
            attributes, which is NaN unless these are known.
        intervals: metric -> (low, high), 95 % bootstrap intervals of the metrics that are means over clips, or ratios of such.
    """

    official: dict[str, float]
    repaired: dict[str, float]
    extra: dict[str, float]
    intervals: dict[str, tuple[float, float]]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """For JSON, which has no NaN: undefined metrics and intervals are None."""
        return {
            kind: {name: None if np.isnan(value).any() else value for name, value in values.items()}
            for kind, values in dataclasses.asdict(self).items()
        }


def score(
    pred: np.ndarray,
    target: np.ndarray,
    speaker: np.ndarray,
    appropriate: np.ndarray,
    threads: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """The metrics of a whole split; beside the arrays, memory for the k-th predictions for all clips is needed.

    Args:
        pred: (clips, predictions, frames, 25), generated reactions; used as float32, like all three.
        target: (clips, frames, 25), the listeners' real reactions.
        speaker: (clips, frames, 25), the speakers' behaviour.
        appropriate: (clips, clips) of 0 and 1 or bool; row i marks the clips whose real reaction suits speaker i.
        threads: that score clips side by side; the numbers do not depend on it.
        progress: told after each clip.

    Raises:
        ValueError: if the arrays do not fit together or hold a value that is not finite, before any work.
    """
    matrix = check_whole(pred, target, speaker, appropriate)
    near = [np.flatnonzero(row) for row in matrix]
    scores = merge([score_part(pred, target, speaker, near, range(len(pred)), threads, progress)])
    if len(pred) > 1:  # the whole set is here, so its float32 sums can be the official ones to the last digit
        official = scores.official | {"FRDvs": float(np.mean([_diversity(pred[:, k].astype(np.float32)) for k in range(pred.shape[1])]))}
        scores = dataclasses.replace(scores, official=official)
    return scores


def score_part(
    pred: np.ndarray,
    targets: Targets,
    speaker: np.ndarray,
    neighbours: Sequence[np.ndarray],
    own: Sequence[int] | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> PartialScores:
    """Scores some clips of a split.

    Beside the arrays, which may be memory-mapped, and the part, memory is bounded by two copies of one clip's predictions and of
    its neighbours' reactions in each thread.

    Args:
        pred: (clips, predictions, frames, 25).
        targets: clip -> (frames, 25), real reactions, as an array or a mapping.
        speaker: (clips, frames, 25).
        neighbours: for each clip of `pred`, the clips of `targets` whose reaction suits its speaker.
        own: for each clip of `pred`, the clip of `targets` that is its real reaction; without it, FrechetAttributes is undefined.
        threads: that score clips side by side; the numbers do not depend on it.
        progress: told after each clip.

    Raises:
        ValueError: if the arrays do not fit together or hold a value that is not finite, before any work.
    """
    check_part(pred, targets, speaker, neighbours, own)
    _compile(max(pred.shape[2], FRAMES))

    def score_one(clip: int) -> tuple[list[float], Moments, Moments]:
        listeners = [Reaction.of(targets[other]) for other in neighbours[clip].tolist()]
        predictions = Reaction.of(pred[clip])
        real = Moments.none() if own is None else Moments.of(Reaction.of(targets[own[clip]]).series)
        return _score_clip(predictions, pred[clip], speaker[clip], listeners), Moments.of(predictions.series), real

    def parts() -> Iterator[PartialScores]:
        with ThreadPoolExecutor(threads) as pool:
            for clip, (values, predicted, real) in enumerate(pool.map(score_one, range(len(pred)))):
                yield PartialScores(np.array([values]), pred[clip].astype(np.float32).astype(np.float64), 0.0, predicted, real)
                if progress:
                    progress(clip + 1, len(pred))

    return total(parts())


def merge(parts: Iterable[PartialScores]) -> Scores:
    """The metrics of all clips of some parts, each of which must have been scored once.

    Raises:
        ValueError: if there are no parts, or they are of different evaluations.
    """
    every = total(parts)
    metrics = {name: float(value) for name, value in means_to_metrics(every.values.mean(axis=0), len(every.mean)).items()}
    # The mean squared difference of two different clips is twice the unbiased variance.
    metrics["FRDvs"] = 2 * every.scatter / (every.clips - 1) / every.mean.size if every.clips > 1 else math.nan
    known = every.predicted.frames == every.real.frames * len(every.mean)  # not where a part was scored without `own`
    metrics["FrechetAttributes"] = frechet(every.predicted, every.real) if known else math.nan
    official, repaired, extra = ({name: metrics[name] for name in names} for names in (OFFICIAL, REPAIRED, EXTRA))
    return Scores(official, repaired, extra, intervals([every]))


@functools.cache
def _compile(frames: int) -> None:
    """Have compiled what scores clips of so many frames; one process of a machine does it, while others wait for what it has made."""
    still = np.zeros((2, frames, len(ATTRIBUTES)), np.float32)
    with compiling():
        _score_clip(predictions := Reaction.of(still), still, still[0], [Reaction.of(still[0])])
        Moments.of(predictions.series)


def _score_clip(predictions: Reaction, pred: np.ndarray, speaker: np.ndarray, listeners: Sequence[Reaction]) -> list[float]:
    """The values of `PER_CLIP`."""
    backwards, series = laid_out(predictions.series[..., ::-1]), [laid_out(listener.series) for listener in listeners]
    lag = offsets(predictions.series, Reaction.of(speaker).series)
    frames = len(speaker)
    agreement, mean = concordance(predictions, listeners), Reaction.of(pred.mean(axis=0, dtype=np.float64)[None])
    energy = energy_scores(predictions, listeners)
    values = {
        "EnergyScore": energy.attribute,
        "EnergyScore_frame": energy.frame,
        "FRCorr_of_mean": float(concordance(mean, listeners).mean(axis=2).max()) * len(pred),
        "FRCorr_no_mouth": float(agreement[:, :, NOT_MOUTH].mean(axis=2).max(axis=1).sum()),
        **dict(zip(ROUGHNESS, at_seams(frame_steps(predictions)).tolist(), strict=True)),
        "real_step": float(np.mean([frame_steps(listener).mean() for listener in listeners])),
        "FRCorr": float(agreement.mean(axis=2).max(axis=1).sum()),
        "FRDist": sum(nearest(one, series, frames) for one in backwards),
        "FRDiv": _diversity(pred.astype(np.float32)),
        "FRVar": float(predictions.variance.mean()) * frames / (frames - 1),
        "FRSyn": float(lag.official[0]),
        "FRSyn_varying": float(np.nansum(lag.varying)),
        "varying": float(np.count_nonzero(~np.isnan(lag.varying))),
    }
    return [values[name] for name in PER_CLIP]


def _diversity(pred: np.ndarray) -> float:
    """The mean squared difference of two different predictions (predictions, frames, 25); 0 for a single one.

    Summed by the call that the official code makes: its float32 sums are off by up to 3e-5, and so is every published value.
    """
    count = len(pred)
    flat = torch.from_numpy(pred.reshape(count, -1))
    squares = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").double() ** 2
    return float(squares.sum()) / (count * (count - 1) * flat.shape[1]) if count > 1 else 0.0
