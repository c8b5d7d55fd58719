"""Where pieces of a sample meet that different tokens or chunks have denoised, they jump: the jump is spread over the frames beside it."""

import torch
from torch import Tensor


def smooth(frames: Tensor, before: Tensor | None, every: int, share: float) -> Tensor:
    """Let pieces that were drawn at once come near to each other where they meet, and change the less the farther from there.

    The last frame of a piece and the first of the next each take half of so much of their jump, the frames beside them less: the middle
    one of 5 takes a third of that from each of its two jumps. What was shown before does not change any more: there the first piece takes
    all of it, and comes back to what it was frame by frame.

    Args:
        frames: (batch, frames, features).
        before: the frame before the first one, which is shown already, (batch, features); None: there is none.
        every: frames of a piece.
        share: of a jump that is taken from it.

    Returns:
        Of the shape of `frames`.
    """
    made = frames.clone()
    if before is not None:
        fading = share ** torch.arange(1, every + 1, device=frames.device, dtype=frames.dtype)[:, None]
        here = made[:, :every]
        here += (before - frames[:, 0])[:, None] * fading[: here.shape[1]]
    reach = every // 2 + 1  # up to the middle of a piece
    near = share / 2 * (1 - torch.arange(reach, device=frames.device, dtype=frames.dtype) / reach)[:, None]
    for seam in range(every, frames.shape[1], every):
        jump = (frames[:, seam] - frames[:, seam - 1])[:, None]
        made[:, seam - reach : seam] += jump * near.flip(0)
        after = made[:, seam : seam + reach]
        after -= jump * near[: after.shape[1]]
    return made
