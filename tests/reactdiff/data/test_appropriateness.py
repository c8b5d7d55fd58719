import numpy as np
import pytest

from reactdiff.data.appropriateness import INDICES, MATRIX
from tests.reactdiff.data.official import NOXI, RECOLA, UDIVA, make, save, write_csv

OTHER = ("NoXI/065_2016-04-14_Nottingham/Expert_video/2", "NoXI/065_2016-04-14_Nottingham/Novice_video/2")
ROWS = [
    ["site", "chat_index", "clip_index"],
    ["UDIVA", "023102_animals", "8"],
    ["NoXI", "065_2016-04-14_Nottingham", "1"],
    ["UDIVA", "023102_talk", "8"],
    ["Recola", "group-1", "2"],
    ["NoXI", "065_2016-04-14_Nottingham", "2"],
]
HALF = len(ROWS) - 1


@pytest.fixture
def tree(tmp_path):
    write_csv(tmp_path / INDICES, ROWS)
    save(tmp_path / MATRIX, np.eye(2 * HALF))
    return make(tmp_path, {"train": (OTHER,), "val": (UDIVA, NOXI, RECOLA)})


def test_the_cut_is_the_hand_made_one(tree):
    # val is UDIVA (row 2 of the index), NoXI 1 (row 1), RECOLA (row 3); mirrored rows lie 5 further on
    whole = np.zeros((10, 10))
    for row, column in [(2, 2), (2, 1), (1, 8), (3, 3), (7, 2), (6, 6), (6, 8), (8, 8), (2, 0), (2, 4), (0, 2)]:
        whole[row, column] = 1
    save(tree.root / MATRIX, whole)
    expected = np.array(
        [
            [1, 1, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 1],
            [0, 0, 1, 0, 0, 0],
            [1, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 1, 1],
            [0, 0, 0, 0, 0, 1],
        ],
        bool,
    )
    matrix = tree.appropriateness("val")
    np.testing.assert_array_equal(matrix, expected)
    assert matrix.dtype == bool


def test_a_split_that_was_cut_before_is_used_as_it_is(tree):
    ready = np.tri(6).astype(np.float64)
    save(tree.root / "neighbour_emotion_val.npy", ready)
    np.testing.assert_array_equal(tree.appropriateness("val"), ready.astype(bool))


def test_without_any_matrix_there_is_none(tree):
    (tree.root / MATRIX).unlink()
    assert tree.appropriateness("train") is None


def test_a_row_without_an_appropriate_reaction_names_the_clip(tree):
    whole = np.eye(2 * HALF)
    whole[HALF + 1] = 0
    save(tree.root / MATRIX, whole)
    with pytest.raises(ValueError, match=rf"clip {NOXI[0]} \(mirrored, row 4"):
        tree.appropriateness("val")


def test_a_pair_that_is_not_in_the_index_or_twice_is_named(tree):
    write_csv(tree.root / INDICES, [*ROWS[:-1], ROWS[2]])
    with pytest.raises(ValueError, match=rf"clip {OTHER[0]} must be in data_indices\.csv once.* nowhere"):
        tree.appropriateness("train")
    with pytest.raises(ValueError, match=r"in rows \[1, 4\]"):
        tree.appropriateness("val")


@pytest.mark.parametrize(
    ("name", "matrix", "rule"),
    [
        (MATRIX, np.eye(8), r"shape \(8, 8\); data_indices\.csv asks for \(10, 10\)"),
        (MATRIX, np.ones((10, 9)), r"shape \(10, 9\)"),
        (MATRIX, np.full((10, 10), 0.5), "0 and 1 only"),
        ("neighbour_emotion_val.npy", np.eye(3), r"shape \(3, 3\).*side 6"),
        ("neighbour_emotion_val.npy", np.full((6, 6), np.nan), "0 and 1 only"),
    ],
)
def test_a_matrix_that_cannot_be_right_is_refused(tree, name, matrix, rule):
    save(tree.root / name, matrix)
    with pytest.raises(ValueError, match=rule):
        tree.appropriateness("val")


def test_a_matrix_without_its_index_is_refused(tree):
    (tree.root / INDICES).unlink()
    with pytest.raises(ValueError, match=r"data_indices\.csv is missing"):
        tree.appropriateness("val")
