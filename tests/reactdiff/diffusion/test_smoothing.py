import pytest
import torch

from reactdiff.diffusion.smoothing import smooth


def test_both_sides_of_a_seam_come_near_to_each_other_and_the_middle_stays() -> None:
    frames = torch.tensor([0.0, 0, 0, 0, 0, 1, 1, 1, 1, 1])[None, :, None]
    made = smooth(frames, None, 5, 0.6).flatten()
    expected = [0, 0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 1, 1]
    torch.testing.assert_close(made, torch.tensor(expected), rtol=0, atol=1e-6)


def test_what_was_shown_does_not_change_so_the_first_piece_takes_its_whole_jump() -> None:
    frames = torch.ones(1, 4, 1)
    assert smooth(frames, torch.zeros(1, 1), 4, 0.5).flatten().tolist() == [0.5, 0.75, 0.875, 0.9375]


def test_nothing_is_moved_where_nothing_jumps_or_nothing_is_taken() -> None:
    torch.manual_seed(0)
    frames = torch.randn(2, 20, 3)
    assert torch.equal(smooth(frames, None, 5, 0.0), frames)
    still = frames[:, :1].expand(2, 20, 3)
    assert torch.equal(smooth(still, still[:, 0], 5, 0.6), still)


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_of_each_jump_so_much_is_left_and_later_frames_change_nothing_before_their_own_piece_s_seam(every: int, share: float) -> None:
    torch.manual_seed(0)
    frames = torch.randn(2, 23, 3)
    made = smooth(frames, None, every, share)
    if every > 2:  # or the middle of a piece is beside both of its seams
        for first in range(every, 23, every):
            torch.testing.assert_close(made[:, first] - made[:, first - 1], (1 - share) * (frames[:, first] - frames[:, first - 1]))
    later = frames.clone()
    later[:, 10:] += 1
    reach = every // 2 + 1
    assert torch.equal(smooth(later, None, every, share)[:, : 10 - reach], made[:, : 10 - reach])
