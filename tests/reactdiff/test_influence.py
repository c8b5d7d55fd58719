"""What a replaced moment of the speaker changes: nothing before it is heard, and the rest in its place."""

import numpy as np
import pytest

from reactdiff.influence import PIECE, by_lag, influence
from tests.reactdiff.test_online import FRAMES, ITEM, reactor, speaker


@pytest.mark.parametrize(("which", "chunk"), [("attributes in chunks", 10), ("latents in chunks", 10), ("unet", 50)])
def test_a_moment_changes_nothing_before_the_end_of_the_chunk_that_holds_it(which: str, chunk: int) -> None:
    own = speaker()
    other = {name: stream[::-1].copy() for name, stream in own.items()}
    changes = influence(reactor(which), own, other, ITEM, seed=7)
    pieces = FRAMES // PIECE
    assert changes.shape == (pieces, pieces)
    for moment in range(pieces):
        heard = (moment * PIECE // chunk + 1) * chunk // PIECE
        assert not changes[moment, :heard].any(), "to the bit"
        assert heard == pieces or changes[moment, heard:].any()


def test_a_moment_that_is_replaced_by_itself_changes_nothing() -> None:
    own = speaker()
    assert not influence(reactor("attributes in chunks"), own, own, ITEM, seed=7).any()


def test_a_lag_is_a_diagonal() -> None:
    changes = np.zeros((6, 6))
    for moment in range(4):
        changes[moment, moment + 2] = 1 + moment
    assert by_lag(changes).tolist() == [0] * 7 + [2.5] + [0] * 3
