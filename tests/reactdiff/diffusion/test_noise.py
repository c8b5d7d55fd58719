import numpy as np

from reactdiff.diffusion.noise import generation_noise, training_hearing, training_levels, training_noise, training_times


def test_training_noise_is_a_function_of_seed_position_and_window() -> None:
    noise, times = training_noise(0, 7, 4, 8), training_times(0, 7, 4, 20)
    assert (noise.shape, noise.dtype, times.shape, times.dtype) == ((4, 50, 8), np.float32, (4,), np.int64)
    longer, more = training_noise(0, 7, 6, 8), training_times(0, 7, 6, 20)
    assert np.array_equal(longer[:4], noise) and np.array_equal(more[:4], times)
    assert all(not np.array_equal(training_noise(seed, position, 4, 8)[0], noise[0]) for seed, position in ((1, 7), (0, 8)))
    assert not np.array_equal(noise[0], noise[1])


def test_times_cover_every_step_and_noise_is_standard_normal() -> None:
    counts = np.bincount(np.concatenate([training_times(3, position, 5, 20) for position in range(200)]), minlength=20)
    assert len(counts) == 20 and counts.min() > 25 and counts.max() < 80
    noise = np.stack([training_noise(3, position, 5, 4) for position in range(200)])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_levels_are_log_normal_ratios_of_noise_to_signal() -> None:
    levels = np.stack([training_levels(3, position, 5, 0.7, 1.5) for position in range(400)])
    assert abs(-levels.mean() / 2 - 0.7) < 0.1 and abs(levels.std() / 2 - 1.5) < 0.1
    assert np.array_equal(training_levels(3, 7, 9, 0.7, 1.5)[:5], levels[7])


def test_every_reaction_starts_from_noise_of_its_own() -> None:
    noise = generation_noise(0, "clip", 0, 0, 3, 8)
    assert noise.shape == (3, 50, 8) and noise.dtype == np.float32
    assert np.array_equal(generation_noise(0, "clip", 0, 0, 5, 8)[:3], noise)
    others = [(1, "clip", 0, 0), (0, "other", 0, 0), (0, "clip", 1, 0), (0, "clip", 0, 1)]
    assert all(not np.array_equal(generation_noise(*key, 3, 8)[0], noise[0]) for key in others)
    assert not np.array_equal(noise[0], noise[1])


def test_the_noise_a_reaction_starts_from_stays_what_it_was() -> None:
    assert generation_noise(0, "clip", 0, 0, 1, 8)[0, 0, :3].tolist() == [0.17239341139793396, -0.5466243028640747, 0.1579715609550476]


def test_every_step_of_a_reaction_has_noise_of_its_own() -> None:
    start, *steps = (generation_noise(0, "clip", 0, 0, 2, 8, step) for step in range(3))
    assert np.array_equal(generation_noise(0, "clip", 0, 0, 2, 8), start)
    assert steps[0].shape == start.shape and steps[0].dtype == np.float32
    assert not np.array_equal(steps[0], start) and not np.array_equal(steps[0], steps[1])
    assert np.array_equal(generation_noise(0, "clip", 0, 0, 5, 8, 2)[:2], steps[1])


def test_hearing_is_a_function_of_seed_position_and_window() -> None:
    hearing = training_hearing(0, 7, 400, 0.5)
    assert (hearing.shape, hearing.dtype, set(hearing.tolist())) == ((400,), np.float32, {0, 1})
    assert np.array_equal(training_hearing(0, 7, 500, 0.5)[:400], hearing)
    assert all(not np.array_equal(training_hearing(seed, position, 400, 0.5), hearing) for seed, position in ((1, 7), (0, 8)))


def test_a_window_goes_unheard_as_often_as_asked_and_more_dropout_hides_more() -> None:
    quiet, quieter = (np.stack([training_hearing(0, position, 15, dropout) for position in range(300)]) for dropout in (0.1, 0.3))
    assert abs(quiet.mean() - 0.9) < 0.02 and abs(quieter.mean() - 0.7) < 0.025 and (quieter <= quiet).all()
    assert training_hearing(0, 7, 100, 0.0).tolist() == [1] * 100
