"""The retrieval baseline: real reactions in pieces, each of which followed where another speaker did much the same.

It has the variety and the steps of real reactions inside its pieces, and jumps at their ends. A model that does not beat it has learnt
less of the speaker than a search finds.
"""

import numpy as np

from reactdiff.clip import ATTRIBUTES, WINDOW
from reactdiff.data.keyed import generator

PAST = 50
"""Frames of the speaker before a piece that are compared: what a listener reacts to lies less than 2 s back."""

STRIDE = 5
"""Frames whose mean is compared, and which a piece may be moved by."""


class Retrieval:
    """Pieces of real reactions, to be looked up by what the speaker did.

    Args:
        speakers: attributes of so many recordings, (recordings, frames, 25); frames a multiple of 50.
        listeners: the reactions to them, alike.
        chunk: frames of a piece, of which only what the speaker did before it is known; 0: windows, and all of the speaker is known.

    Raises:
        ValueError: if there are no recordings.
    """

    def __init__(self, speakers: np.ndarray, listeners: np.ndarray, chunk: int = 0):
        if not len(speakers):
            raise ValueError("there are no recordings to take reactions from: give at least one")
        self.piece, self.ahead = chunk or WINDOW, 0 if chunk else WINDOW
        self._listeners = listeners
        spread = speakers.std(axis=(0, 1))
        self._scale = np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)
        self._known = self._summary(speakers)

    def react(self, speaker: np.ndarray, count: int, key: tuple[str, int]) -> np.ndarray:
        """Reactions to a speaker (frames, 25), the k-th made of the k-th best recordings, (count, frames, 25) float32.

        Args:
            speaker: attributes.
            count: how many; of the same recordings if there are fewer.
            key: of the item, which decides where nothing is known of the speaker yet.
        """
        asked, frames = self._summary(speaker[None])[0], len(speaker)
        found = np.empty((count, frames, len(ATTRIBUTES)), np.float32)
        for start in range(0, frames, self.piece):
            stop = min(start + self.piece, frames)
            recordings, places = self._nearest(asked, start, stop, key)
            for k in range(count):
                recording = recordings[k % len(recordings)]
                place = places[recording]
                found[k, start:stop] = self._listeners[recording, place : place + stop - start]
        return found

    def _nearest(self, asked: np.ndarray, start: int, stop: int, key: tuple[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """The recordings, the most similar first, and in each the best place to take the piece from."""
        count, length = self._listeners.shape[:2]
        low, high = max(0, start - PAST), min(start + self.ahead, len(asked) * STRIDE)
        query = asked[low // STRIDE : high // STRIDE]
        if not len(query):  # an online listener's first piece
            rng = generator("retrieval", *key)
            return rng.permutation(count), rng.integers((length - (stop - start)) // STRIDE + 1, size=count) * STRIDE
        places = np.arange(start - low, length - max(high, stop) + start + 1, STRIDE)
        distances = np.empty((count, len(places)), np.float32)
        for number, first in enumerate((places - (start - low)) // STRIDE):
            distances[:, number] = ((self._known[:, first : first + len(query)] - query) ** 2).sum(axis=(1, 2))
        best = distances.argmin(axis=1)
        return np.argsort(distances[np.arange(count), best], kind="stable"), places[best]

    def _summary(self, attributes: np.ndarray) -> np.ndarray:
        """Means over every few frames, in units of their spread, (recordings, frames / STRIDE, 25) float32."""
        recordings, frames, width = attributes.shape
        means = attributes[:, : frames // STRIDE * STRIDE].reshape(recordings, -1, STRIDE, width).mean(axis=2)
        return (means * self._scale).astype(np.float32)
