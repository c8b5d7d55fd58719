"""What is kept of scored clips: plain numbers that add up, so that clips can be scored anywhere and in any order."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

PER_CLIP = ("FRCorr", "FRDist", "FRDiv", "FRVar", "FRSyn", "FRSyn_varying")
"""Metrics that are sums over clips. FRDvs compares clips with each other and is kept as a mean and a scatter."""


@dataclass(frozen=True)
class Part:
    """The state of the metrics after some clips; two of them add up to the state after all their clips.

    Attributes:
        clips: number of clips.
        sums: metric -> sum over the clips; FRSyn_varying: over the predictions that count.
        varying: number of predictions in which an attribute varies, for FRSyn_varying.
        mean: (predictions, frames, 25) float64, mean of the predictions over the clips.
        scatter: sum over clips and elements of the squared deviation from that mean.
    """

    clips: int
    sums: dict[str, float]
    varying: int
    mean: np.ndarray
    scatter: float

    def __add__(self, other: "Part") -> "Part":
        """Both parts' clips together (mean and scatter: Chan, Golub and LeVeque, 1983).

        Raises:
            ValueError: if their numbers of predictions or frames differ.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"a part of (predictions, frames, attributes) {self.mean.shape} cannot be merged with one of {other.mean.shape}: "
                "all parts must come from one evaluation; delete the stale ones and run it again"
            )
        clips = self.clips + other.clips
        shift = other.mean - self.mean
        return Part(
            clips,
            {name: self.sums[name] + other.sums[name] for name in PER_CLIP},
            self.varying + other.varying,
            self.mean + shift * (other.clips / clips),
            self.scatter + other.scatter + float(np.vdot(shift, shift)) * self.clips * other.clips / clips,
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """For `numpy.savez`: nothing in it needs pickle."""
        counts = np.array([self.clips, self.varying], dtype=np.int64)
        sums = np.array([*(self.sums[name] for name in PER_CLIP), self.scatter], dtype=np.float64)
        return {"counts": counts, "sums": sums, "mean": self.mean}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Part":
        """The inverse of `to_arrays`, bit for bit."""
        clips, varying = arrays["counts"].tolist()
        *sums, scatter = arrays["sums"].tolist()
        return cls(clips, dict(zip(PER_CLIP, sums, strict=True)), varying, arrays["mean"], scatter)
