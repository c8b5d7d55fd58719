"""What is kept of scored clips: a few numbers of each, and sums that add up, so that clips can be scored anywhere, in any order."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from reactdiff.metrics.frechet import Moments
from reactdiff.metrics.roughness import SEAMS

ROUGHNESS = ("Roughness", *(f"Roughness_{length}" for length in SEAMS))
PER_CLIP = (
    *("EnergyScore", "EnergyScore_frame", "FRCorr_of_mean", "FRCorr_no_mouth", *ROUGHNESS, "real_step"),
    *("FRCorr", "FRDist", "FRDiv", "FRVar", "FRSyn", "FRSyn_varying", "varying"),
)
"""What is kept of each clip. FRSyn_varying is a sum over the `varying` predictions in which an attribute varies; those of `ROUGHNESS` are
frame steps, to be divided by the `real_step`. Intervals sort clips by the last of these first."""


@dataclass(frozen=True)
class PartialScores:
    """The state of the metrics after some clips; `total` adds up those of several.

    Attributes:
        values: (clips, len(PER_CLIP)) float64, in the order in which clips came.
        mean: (predictions, frames, 25) float64, mean of the predictions over the clips, for FRDvs.
        scatter: sum over clips and elements of the squared deviation from that mean.
        predicted: of the frames of all predictions.
        real: of the frames of the clips' own real reactions, as far as these were given.
    """

    values: np.ndarray
    mean: np.ndarray
    scatter: float
    predicted: Moments
    real: Moments

    @property
    def clips(self) -> int:
        """Number of clips."""
        return len(self.values)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """For `numpy.savez`: nothing in it needs pickle."""
        return {
            "values": self.values,
            "mean": self.mean,
            "scatter": np.array(self.scatter),
            "frames": np.array([self.predicted.frames, self.real.frames]),
            "moments": np.stack([np.vstack([moments.mean, moments.scatter]) for moments in (self.predicted, self.real)]),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "PartialScores":
        """The inverse of `to_arrays`, bit for bit."""
        both = zip(arrays["frames"].tolist(), arrays["moments"], strict=True)
        predicted, real = (Moments(frames, moments[0], moments[1:]) for frames, moments in both)
        return cls(arrays["values"], arrays["mean"], float(arrays["scatter"]), predicted, real)


def total(parts: Iterable[PartialScores]) -> PartialScores:
    """The state after the clips of all parts, in their order (mean and scatter: Chan, Golub and LeVeque, 1983).

    The time is linear in the parts, and none is kept but its values: they may come from a generator.

    Raises:
        ValueError: if there are none, or their numbers of predictions or frames differ.
    """
    parts = iter(parts)
    if (first := next(parts, None)) is None:
        raise ValueError("there are no parts to merge: score at least one clip")
    values, clips, mean, scatter, predicted, real = [first.values], first.clips, first.mean, first.scatter, first.predicted, first.real
    for part in parts:
        if part.mean.shape != mean.shape:
            raise ValueError(
                f"a part of (predictions, frames, attributes) {mean.shape} cannot be merged with one of {part.mean.shape}: "
                "all parts must come from one evaluation; delete the stale ones and run it again"
            )
        before, clips = clips, clips + part.clips
        shift = part.mean - mean
        mean = mean + shift * (part.clips / clips)
        scatter = scatter + part.scatter + float(np.vdot(shift, shift)) * before * part.clips / clips
        predicted, real = predicted + part.predicted, real + part.real
        values.append(part.values)
    return PartialScores(np.concatenate(values), mean, scatter, predicted, real)


def means_to_metrics(means: np.ndarray, predictions: int) -> dict[str, np.ndarray]:
    """The metrics that are means over clips, or ratios of such, from means (..., len(PER_CLIP)) of `PartialScores.values`."""
    each = dict(zip(PER_CLIP, np.moveaxis(means, -1, 0), strict=True))
    total, varying, real = each.pop("FRSyn_varying"), each.pop("varying"), each.pop("real_step")
    rough = {name: np.divide(each[name], real, out=np.full_like(real, np.nan), where=real > 0) for name in ROUGHNESS}
    return (
        each
        | rough
        | {
            "FRCorr_per_prediction": each["FRCorr"] / predictions,
            "FRDist_per_prediction": each["FRDist"] / predictions,
            "FRSyn_varying": np.divide(total, varying, out=np.full_like(total, np.nan), where=varying > 0),
        }
    )
