import numpy as np
import pytest

from reactdiff.metrics.baselines import mean_reaction, mimic, noise, random_listener, strangers

ITEMS = [("one", 0), ("two", 0), ("one", 1), ("two", 1)]


def test_noise_is_uniform_and_a_function_of_its_key_alone():
    drawn = noise(ITEMS, 3, 200, seed=5)
    assert drawn.shape == (4, 3, 200, 25)
    assert drawn.dtype == np.float32
    assert drawn.mean() == pytest.approx(0.5, abs=0.01)
    assert drawn.var() == pytest.approx(1 / 12, rel=0.02)
    np.testing.assert_array_equal(noise(ITEMS[2:3], 1, 200, seed=5)[0, 0], drawn[2, 0])
    assert len({one.tobytes() for one in drawn.reshape(12, -1)}) == 12
    assert not np.array_equal(noise(ITEMS, 3, 200, seed=6), drawn)


def test_strangers_are_of_another_script_in_either_role():
    scripts = np.array([0, 0, 1, 2, 2, 2])
    same = scripts[:, None] == scripts
    appropriate = np.kron(np.eye(2, dtype=bool), same)
    np.testing.assert_array_equal(strangers(appropriate), np.tile(~same, (2, 2)))
    one_way = appropriate.copy()
    one_way[:6, :6] &= np.tri(6, dtype=bool)
    one_way[6:, 6:] = np.eye(6)
    np.testing.assert_array_equal(strangers(one_way), np.tile(~same, (2, 2)), "one direction of one speaker tells of the script")


def test_of_a_single_script_strangers_are_those_who_suit_neither_way():
    appropriate = np.kron(np.eye(2, dtype=bool), np.ones((3, 3), bool))
    np.testing.assert_array_equal(strangers(appropriate), ~appropriate)


def test_a_random_listener_is_any_stranger():
    strange = np.array([[0, 1, 1, 1], [1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 1]], dtype=bool)
    drawn = random_listener(ITEMS, strange, 40, seed=0)
    assert drawn.shape == (4, 40)
    assert [set(row) for row in drawn.tolist()] == [{1, 2, 3}, {0, 3}, {0, 1}, {3}]
    np.testing.assert_array_equal(random_listener(ITEMS[1:2], strange[1:2], 40, seed=0), drawn[1:2])


def test_a_random_listener_needs_somebody_else():
    with pytest.raises(ValueError, match="no clip is of a stranger to one in direction 0"):
        random_listener(ITEMS[:1], np.zeros((1, 2), bool), 1, seed=0)


def test_the_mean_reaction_is_constant():
    mean = np.linspace(0, 1, 25)
    drawn = mean_reaction(2, 3, 5, mean)
    assert drawn.shape == (2, 3, 5, 25)
    assert (drawn == mean.astype(np.float32)).all()


def test_mimic_copies_the_speaker():
    speaker = np.random.default_rng(0).random((2, 5, 25), dtype=np.float32)
    drawn = mimic(speaker, 3)
    assert drawn.shape == (2, 3, 5, 25)
    assert (drawn == speaker[:, None]).all()
