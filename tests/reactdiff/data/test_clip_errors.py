import os
import pickle
import struct

import numpy as np
import pytest
import soundfile
import torch

from reactdiff.data.files import ClipError
from tests.reactdiff.data import official
from tests.reactdiff.data.official import NOXI, RECOLA, ROWS, make

KEY = "NoXI__065_2016-04-14_Nottingham__Expert_video__1"
EMOTION = "test/Emotion/NoXI/065_2016-04-14_Nottingham/P2/1.csv"
FACE = f"test/3D_FV_files/{NOXI[1]}.npy"
WAV = f"test/Audio_files/{NOXI[1]}.wav"
VIDEO = f"features/test/Video_features/{NOXI[1]}.pth"
AUDIO = f"features/test/Audio_features/{NOXI[1]}.pth"


class Evil:
    def __reduce__(self):
        return os.system, ("false",)


def rows(cell="0.5", count=ROWS, width=25):
    return [["name"] * width, *([cell] + ["0"] * (width - 1) for _ in range(count))]


def tensors(au=7, rows=ROWS, value=0.0):
    return [torch.zeros(ROWS, 3), torch.full((rows, au), value), torch.zeros(ROWS, 5)]


def csv(content):
    return lambda file: official.write_csv(file, content)


def npy(array):
    return lambda file: np.save(file, array, allow_pickle=True)


def pth(content):
    return lambda file: torch.save(content, file)


def sound(count, rate=16_000):
    return lambda file: soundfile.write(file, np.zeros(count), rate)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def remove(file):
    file.unlink()


SPIKE = np.where(np.arange(58) == 3, np.nan, 0.0) * np.ones((ROWS, 1))

FAULTS = [
    (EMOTION, remove, "missing"),
    (EMOTION, csv(rows(width=24)), r"shape \(51, 24\)"),
    (EMOTION, csv(rows(count=ROWS - 1)), r"shape \(50, 25\); this dataset has 51 rows"),
    (EMOTION, csv(rows("nan")), "row 0, column 0 is nan"),
    (EMOTION, csv(rows("1e300")), "finite float32"),
    (EMOTION, csv(rows("happy")), "numbers"),
    (EMOTION, csv([*rows(), ["0"] * 3]), "same number of numbers"),
    (EMOTION, csv(rows(count=0)), "no rows"),
    (EMOTION, lambda file: file.write_bytes(b"\xff\xfe\x00head\n\x81"), "decode"),
    (FACE, remove, "missing"),
    (FACE, cut, r"no whole \.npy"),
    (FACE, lambda file: file.write_bytes(b""), r"no whole \.npy"),
    (FACE, npy(np.array([Evil()])), r"no whole \.npy"),
    (FACE, npy(np.full((ROWS, 58), "x")), "not numbers"),
    (FACE, npy(np.zeros((ROWS, 52))), r"shape \(51, 52\)"),
    (FACE, npy(np.zeros((ROWS, 2, 58))), r"shape \(51, 2, 58\)"),
    (FACE, npy(np.zeros((ROWS + 1, 58))), r"shape \(52, 58\)"),
    (FACE, npy(SPIKE), "row 0, column 3 is nan"),
    (WAV, remove, "missing"),
    (WAV, cut, "truncated"),
    (WAV, lambda file: file.write_bytes(b"RIFF"), "truncated"),
    (WAV, lambda file: file.write_bytes(b"no sound at all"), "no readable sound"),
    (WAV, sound(640 * (ROWS - 3)), "48 rows; this dataset has 51"),
    (WAV, sound(100), "0 rows"),
    (WAV, sound(640 * (ROWS + 3)), "54 rows"),
    (WAV, sound(16_000 * 2, 16_001), "16001 Hz"),
]

FEATURE_FAULTS = [
    (VIDEO, remove, "missing"),
    (VIDEO, cut, "truncated or would need unpickling"),
    (VIDEO, pth(Evil()), "truncated or would need unpickling"),
    (VIDEO, lambda file: file.write_bytes(b""), "truncated or would need unpickling"),
    (VIDEO, lambda file: file.write_bytes(pickle.dumps([1, 2, 3], protocol=2)), "would need unpickling"),
    (VIDEO, pth(tensors()[:2]), "list of 3 tensors"),
    (VIDEO, pth({"va": torch.zeros(1)}), "list of 3 tensors"),
    (VIDEO, pth([*tensors()[:2], 1.0]), "list of 3 tensors"),
    (VIDEO, pth([*tensors()[:2], torch.zeros(ROWS)]), "list of 3 tensors"),
    (VIDEO, pth(tensors(au=8)), "stream au is 8 wide; in this dataset it is 7"),
    (VIDEO, pth(tensors(rows=ROWS - 1)), "stream au has 50 rows; this dataset has 51"),
    (VIDEO, pth(tensors(value=float("inf"))), "stream au .* row 0, column 0 is inf"),
    (VIDEO, pth(tensors(value=70_000.0)), "fit float16, at most 65504; row 0, column 0 is 70000"),
    (AUDIO, pth([torch.zeros(ROWS, 26), torch.zeros(ROWS - 3, 6)]), "stream w2v has 48 rows"),
    (AUDIO, pth([torch.zeros(ROWS, 13), torch.zeros(ROWS, 6)]), "stream mfcc is 13 wide"),
]


@pytest.mark.parametrize(("file", "spoil", "rule"), FAULTS)
def test_a_bad_file_is_refused_with_clip_file_and_rule(tmp_path, file, spoil, rule):
    _refused(make(tmp_path, {"test": (NOXI, RECOLA)}), file, spoil, rule)


@pytest.mark.parametrize(("file", "spoil", "rule"), FEATURE_FAULTS)
def test_a_bad_feature_file_is_refused_with_clip_file_and_rule(tmp_path, file, spoil, rule):
    _refused(make(tmp_path, {"test": (NOXI, RECOLA)}, video=True, audio=True), file, spoil, rule)


def _refused(tree, file, spoil, rule):
    spoil(tree.root / file)
    good = tree.pairs("test")[1]
    assert tree.read(good).key == good.key
    with pytest.raises(ClipError, match=rule) as caught:
        tree.read(tree.pairs("test")[0])
    assert (caught.value.key, caught.value.file) == (KEY, file)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_wav_of_unknown_size_is_read(tmp_path):
    tree = make(tmp_path, {"test": (NOXI,)})
    content = bytearray((tmp_path / WAV).read_bytes())
    content[4:8] = struct.pack("<I", 0xFFFFFFFF)
    (tmp_path / WAV).write_bytes(content)
    assert tree.read(tree.pairs("test")[0]).people["b"]["mfcc"].shape == (50, 26)


def test_a_missing_or_misshapen_mean_face_is_the_trees_fault_and_no_clips(tmp_path):
    tree = make(tmp_path, {"test": (NOXI,)})
    face = tmp_path / "external/FaceVerse/mean_face.npy"
    np.save(face, np.zeros(57))
    with pytest.raises(ValueError, match="57 numbers") as caught:
        tree.read(tree.pairs("test")[0])
    assert not isinstance(caught.value, ClipError)
    face.unlink()
    with pytest.raises(ValueError, match=r"mean_face\.npy is missing"):
        tree.read(tree.pairs("test")[0])
