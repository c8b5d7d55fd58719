import pytest
import torch

from reactdiff.diffusion.smoothing import smooth


def test_a_jump_is_spread_over_the_piece_after_it() -> None:
    frames = torch.tensor([0.0, 0, 1, 1, 1, 1])[None, :, None]
    assert smooth(frames, None, 2, 0.5).flatten().tolist() == [0, 0, 0.5, 0.75, 0.875, 0.9375]
    assert smooth(frames[:, 2:4], torch.zeros(1, 1), 2, 0.5).flatten().tolist() == [0.5, 0.75]


def test_nothing_is_moved_where_nothing_jumps_or_nothing_is_carried() -> None:
    torch.manual_seed(0)
    frames = torch.randn(2, 20, 3)
    assert torch.equal(smooth(frames, None, 5, 0.0), frames)
    still = frames[:, :1].expand(2, 20, 3)
    assert torch.equal(smooth(still, still[:, 0], 5, 0.6), still)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_of_each_jump_so_much_is_left_and_later_pieces_change_nothing_before(share: float) -> None:
    torch.manual_seed(0)
    frames = torch.randn(2, 23, 3)
    made = smooth(frames, None, 5, share)
    for first in (5, 10, 15, 20):
        torch.testing.assert_close(made[:, first] - made[:, first - 1], (1 - share) * (frames[:, first] - made[:, first - 1]))
    later = frames.clone()
    later[:, 10:] += 1
    assert torch.equal(smooth(later, None, 5, share)[:, :10], made[:, :10])
