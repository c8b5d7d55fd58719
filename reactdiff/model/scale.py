"""The scale that a stage 2 denoises in: from encodings as they are, to a range or a variance of the training set, and back."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from reactdiff.diffusion.sampler import Limits


class Scaled(nn.Module):
    """A module with the statistics of the training set's encodings: inside, each feature lies in [-1, 1] there, or has variance 1.

    Args:
        normalisation: "feature", "frame" or "variance", as `diffusion.normalisation` has them.
        frames: of a clip; statistics are by frame where the normalisation is.
        width: features of an encoding.

    Attributes:
        minimum: smallest encoding of the training set, float32, (1, encoding) or (frames, encoding).
        maximum: largest, of the same shape.
        mean: of the training set, float32, (1, encoding), where it is mapped to variance 1.
        deviation: standard deviation, of the same shape.
    """

    minimum: Tensor
    maximum: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, normalisation: str, frames: int, width: int):
        super().__init__()
        rows = frames if normalisation == "frame" else 1
        self.register_buffer("minimum", torch.full((rows, width), -1.0))  # on "meta" a minus would load torch's compiler
        self.register_buffer("maximum", torch.ones(rows, width))
        self.standardised = normalisation == "variance"
        if self.standardised:
            self.register_buffer("mean", torch.zeros(1, width))
            self.register_buffer("deviation", torch.ones(1, width))

    def set_range(self, minimum: Tensor, maximum: Tensor, mean: Tensor | None = None, deviation: Tensor | None = None) -> None:
        """Takes the range of the training set's encodings, both (frames, encoding); per feature, it is reduced over the frames.

        Where they are mapped to variance 1, also their mean and standard deviation, (encoding,).

        Raises:
            ValueError: if the shape is not that of this model's encodings, or a minimum is not below or at its maximum.
        """
        if self.standardised and (mean is None or deviation is None):
            raise ValueError("diffusion.normalisation=variance needs the encodings' mean and standard deviation")
        if not (minimum <= maximum).all():
            raise ValueError("the latents' minimum must be at most their maximum, and neither may be NaN; encode the training set again")
        if len(self.minimum) == 1:
            minimum, maximum = minimum.amin(0, keepdim=True), maximum.amax(0, keepdim=True)
        if minimum.shape != self.minimum.shape or maximum.shape != self.maximum.shape:
            raise ValueError(
                f"the latents' range is {tuple(minimum.shape)} (frames, features), but this model needs {tuple(self.minimum.shape)}; "
                "use the statistics of the latents it is trained on"
            )
        self.minimum.copy_(minimum)
        self.maximum.copy_(maximum)
        if self.standardised and mean is not None and deviation is not None:
            self.mean.copy_(mean)
            self.deviation.copy_(deviation)

    def normalise(self, encoding: Tensor, feature: int = 0, frame: int = 0) -> Tensor:
        """Raw encodings (..., frames, features) on the scale of this module, float32; a constant feature becomes 0.

        Args:
            encoding: features of an encoding, for some frames of a clip.
            feature: the first of them.
            frame: the first of these; it counts where the range is per frame.

        Raises:
            ValueError: if the range is per frame and ends before these do.
        """
        centre, radius = self._centre_and_radius(encoding, feature, frame)
        return (encoding.float() - centre) / radius

    def denormalise(self, normalised: Tensor, frame: int = 0) -> Tensor:
        """The inverse of `normalise` for the first features, (..., frames, features)."""
        centre, radius = self._centre_and_radius(normalised, 0, frame)
        return normalised.float() * radius + centre

    def limits(self, features: int) -> Limits:
        """Least and largest value on this scale of the first features, as the training set has them."""
        if not self.standardised:
            return -1.0, 1.0
        return self.normalise(self.minimum[..., :features])[0], self.normalise(self.maximum[..., :features])[0]

    def _centre_and_radius(self, encoding: Tensor, feature: int, frame: int) -> tuple[Tensor, Tensor]:
        (frames, features), rows = encoding.shape[-2:], len(self.minimum)
        if rows != 1 and rows < frame + frames:
            raise ValueError(
                f"latents of {frame + frames} frames cannot be normalised per frame by the range of {rows} frames; "
                "train with diffusion.normalisation=feature to generate any length"
            )
        these = slice(0, 1) if rows == 1 else slice(frame, frame + frames)
        those = slice(feature, feature + features)
        if self.standardised:
            centre, radius = self.mean[:, those], self.deviation[:, those]
        else:
            minimum, maximum = self.minimum[these, those], self.maximum[these, those]
            centre, radius = (maximum + minimum) / 2, (maximum - minimum) / 2
        # A feature that varies less than float32 can tell is constant: dividing by its range would only blow up rounding.
        varies = radius > torch.finfo(radius.dtype).eps * centre.abs()
        return centre, torch.where(varies, radius, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the statistics with the module, but keeps them float32 when the weights change precision (`.bfloat16()`)."""
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            if (moved := getattr(self, name)).dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self
