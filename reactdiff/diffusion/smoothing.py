"""Where pieces of a sample meet that different tokens or chunks have denoised, they jump: the jump is spread over the frames after it."""

import torch
from torch import Tensor


def smooth(frames: Tensor, before: Tensor | None, every: int, share: float) -> Tensor:
    """Let each piece begin near where the one before it ended, and come back to what it was.

    Frame j of a piece is moved by share^(j + 1) of the jump into it, so that (1 - share) of the jump is left; nothing depends on a later
    piece. Each jump is measured from what the piece before has become.

    Args:
        frames: (batch, frames, features).
        before: the frame before the first one, (batch, features); None: there is none, and nothing to come near to.
        every: frames of a piece.
        share: of a jump that is carried on to the next frame.

    Returns:
        Of the shape of `frames`.
    """
    fading = share ** torch.arange(1, every + 1, device=frames.device, dtype=frames.dtype)[:, None]
    made = []
    for piece in frames.split(every, dim=1):
        moved = piece if before is None else piece + (before - piece[:, 0])[:, None] * fading[: piece.shape[1]]
        made.append(moved)
        before = moved[:, -1]
    return torch.cat(made, dim=1)
