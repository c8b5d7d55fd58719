"""Which moments of a speaker a reaction depends on: by how much it changes where a moment is replaced by another speaker's."""

from collections.abc import Mapping

import numpy as np
import torch

from reactdiff.generate import Item, Reactor

PIECE = 5
"""Frames that are replaced at a time, 0.2 s: a token of the recipes' transformers."""


@torch.no_grad()
def influence(reactor: Reactor, speaker: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], item: Item, seed: int) -> np.ndarray:
    """The change of each piece of a reaction for each piece of the speaker that is replaced, all drawn from the same noise.

    Args:
        reactor: the trained model.
        speaker: stream -> (frames, width), of a multiple of 50 frames.
        other: the same of whom replaces.
        item: clip and direction, which key the noise.
        seed: which keys it, too.

    Returns:
        (pieces, pieces): the root mean square over attributes and a piece's frames; rows are pieces of the speaker.
    """
    frames = len(next(iter(speaker.values())))
    pieces = frames // PIECE
    encoded = []
    for piece in range(-1, pieces):
        streams = {name: stream.copy() for name, stream in speaker.items()}
        if piece >= 0:
            for name, stream in streams.items():
                stream[piece * PIECE : (piece + 1) * PIECE] = other[name][piece * PIECE : (piece + 1) * PIECE]
        batch = {name: torch.from_numpy(stream)[None].to(reactor.codec.device) for name, stream in streams.items()}
        encoded.append(reactor.codec.listen(batch)[0].float().cpu().numpy())
    # In each row of a batch of one size: the last bits of a product may depend on which row of how many it is.
    as_it_was, replaced = (
        reactor.react(np.stack(rows), [item] * pieces, 1, seed)["attributes"][:, 0] for rows in ([encoded[0]] * pieces, encoded[1:])
    )
    changes = (replaced - as_it_was).reshape(pieces, pieces, -1)
    return np.sqrt(np.square(changes).mean(axis=2))


def by_lag(changes: np.ndarray) -> np.ndarray:
    """The mean change so many pieces after the replaced one, for each lag from 1 - pieces to pieces - 1; (2 pieces - 1,)."""
    pieces = len(changes)
    return np.array([np.diagonal(changes, lag).mean() for lag in range(1 - pieces, pieces)])
