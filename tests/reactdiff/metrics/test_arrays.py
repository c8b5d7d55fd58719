import numpy as np
import pytest

from reactdiff.metrics.arrays import load_arrays
from reactdiff.metrics.official import score, score_part


def evaluation(**changes):
    rng = np.random.default_rng(0)
    arrays = {
        "pred": rng.random((3, 2, 50, 25), dtype=np.float32),
        "target": rng.random((3, 50, 25), dtype=np.float32),
        "speaker": rng.random((3, 50, 25), dtype=np.float32),
        "appropriate": np.eye(3, dtype=bool),
    }
    return arrays | changes


def with_value(name, place, value):
    array = evaluation()[name].astype(np.float64 if name == "appropriate" else np.float32)
    array[place] = value
    return {name: array}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pred": np.zeros((3, 50, 25), np.float32)}, r"pred has the shape \(3, 50, 25\), but must be \(clips, predictions, frames, 25\)"),
        ({"pred": np.zeros((3, 2, 50, 24), np.float32)}, r"pred has the shape \(3, 2, 50, 24\)"),
        ({"pred": np.zeros((3, 0, 50, 25), np.float32)}, r"pred has the shape \(3, 0, 50, 25\)"),
        ({"pred": np.zeros((2, 2, 50, 25), np.float32)}, "pred has 2 clips and target has 3"),
        ({"speaker": np.zeros((3, 51, 25), np.float32)}, "pred has 50 frames and speaker has 51"),
        ({"target": np.zeros((3, 51, 25), np.float32)}, "pred has 50 frames and target of clip 0 has 51"),
        ({"target": np.zeros((3, 50, 25), np.int32)}, "target holds int32, but must hold floating-point numbers"),
        (
            {name: np.zeros((3, *((2,) if name == "pred" else ()), 49, 25)) for name in ("pred", "target", "speaker")},
            "pred has 49 frames, but FRSyn",
        ),
        (with_value("pred", (2, 1, 7, 15), np.nan), "pred of clip 2, prediction 1 is nan at frame 7 in attribute valence"),
        (with_value("target", (1, 3, 0), np.nan), "target of clip 1 is nan at frame 3 in attribute AU1"),
        (with_value("speaker", (0, 49, 24), np.inf), "speaker of clip 0 is inf at frame 49 in attribute Contempt"),
        ({"appropriate": np.ones((3, 4), bool)}, r"appropriate has the shape \(3, 4\), but must be square"),
        ({"appropriate": np.ones((4, 4), bool)}, r"one row for each of the 3 clips"),
        ({"appropriate": np.diag([True, False, True])}, "row 1 of appropriate holds no 1"),
        (with_value("appropriate", (0, 2), 0.5), r"appropriate\[0, 2\] is 0.5, but must be 0 or 1"),
    ],
)
def test_arrays_that_cannot_be_scored_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        score(**evaluation(**changes))


def test_a_part_is_refused_without_the_reaction_of_a_neighbour():
    arrays = evaluation()
    near = [np.array([clip]) for clip in range(3)]
    with pytest.raises(ValueError, match="clip 2 is a neighbour, but targets has no reaction for it"):
        score_part(arrays["pred"], {0: arrays["target"][0], 1: arrays["target"][1]}, arrays["speaker"], near)
    with pytest.raises(ValueError, match="pred has 3 clips, speaker 3 and neighbours 2"):
        score_part(arrays["pred"], arrays["target"], arrays["speaker"], near[:2])
    with pytest.raises(ValueError, match="pred has 3 clips and own 2"):
        score_part(arrays["pred"], arrays["target"], arrays["speaker"], near, own=[0, 1])
    with pytest.raises(ValueError, match="clip 3 is a clip's own reaction, but targets has no reaction for it"):
        score_part(arrays["pred"], arrays["target"], arrays["speaker"], near, own=[0, 1, 3])
    with pytest.raises(ValueError, match="clip 1 has no neighbours"):
        score_part(arrays["pred"], arrays["target"], arrays["speaker"], [near[0], near[1][:0], near[2]])


def test_arrays_come_back_from_a_file(tmp_path):
    np.savez_compressed(tmp_path / "arrays.npz", **evaluation())
    for name, array in load_arrays(tmp_path / "arrays.npz").items():
        np.testing.assert_array_equal(array, evaluation()[name])


def test_a_file_that_lacks_an_array_is_refused_with_both_names(tmp_path):
    np.savez(tmp_path / "arrays.npz", pred=np.zeros(3))
    with pytest.raises(ValueError, match=r"arrays.npz has no array 'target'.* it holds pred"):
        load_arrays(tmp_path / "arrays.npz")


def test_a_pickled_object_is_never_read(tmp_path):
    np.savez(tmp_path / "arrays.npz", **evaluation(speaker=np.array([{}], dtype=object)))
    with pytest.raises(ValueError, match=r"arrays.npz: the array 'speaker' cannot be read"):
        load_arrays(tmp_path / "arrays.npz")


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"PK\x03\x04 a broken one"])
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "arrays.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"arrays.npz is not a whole .npz file"):
        load_arrays(tmp_path / "arrays.npz")


def test_a_damaged_array_is_refused_by_name(tmp_path):
    path = tmp_path / "arrays.npz"
    np.savez(path, **evaluation())
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"arrays.npz: the array 'pred' cannot be read \(Bad CRC-32"):
        load_arrays(path)


def test_a_single_array_is_refused(tmp_path):
    np.save(tmp_path / "pred.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"pred.npy is not a whole .npz file"):
        load_arrays(tmp_path / "pred.npy")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.npz does not exist"):
        load_arrays(tmp_path / "nowhere.npz")
