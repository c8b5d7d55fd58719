import pickle

import numpy as np
import pytest
import torch

from reactdiff.data.react2024 import Tree
from reactdiff.data.sample import StreamSpec
from tests.reactdiff.data import official
from tests.reactdiff.data.official import MEAN_FACE, NOXI, PAIRS, RECOLA, ROWS, UDIVA, make


def test_both_persons_are_read_with_the_attributes_and_coefficients_that_lie_under_their_names(tmp_path):
    tree = make(tmp_path, {"val": PAIRS})
    for pair, (speaker, listener) in zip(tree.pairs("val"), PAIRS, strict=True):
        clip = tree.read(pair)
        for person, path in {"a": speaker, "b": listener}.items():
            np.testing.assert_array_equal(clip.people[person]["attributes"], official.attributes_of(path)[:50])
            np.testing.assert_array_equal(clip.people[person]["coefficients"], official.coefficients_of(path)[:50] - MEAN_FACE)
        assert clip.meta["paths"] == {"a": speaker, "b": listener}


@pytest.mark.parametrize(
    ("path", "emotion"),
    [
        (NOXI[0], "NoXI/065_2016-04-14_Nottingham/P1/1"),
        (NOXI[1], "NoXI/065_2016-04-14_Nottingham/P2/1"),
        ("RECOLA/group-2/P41/3", "RECOLA/group-2/P1/3"),
        ("RECOLA/group-2/P42/3", "RECOLA/group-2/P2/3"),
        ("RECOLA/group-3/P45/1", "RECOLA/group-3/P1/1"),
        ("RECOLA/group-3/P46/1", "RECOLA/group-3/P2/1"),
        (UDIVA[0], UDIVA[0]),
    ],
)
def test_emotion_files_lie_where_the_official_tree_has_them(tmp_path, path, emotion):
    make(tmp_path, {"train": ((path, path.replace("Expert", "Other")),)})
    assert (tmp_path / "train/Emotion" / f"{emotion}.csv").is_file()


def test_natural_streams_are_the_attributes_by_class_and_cepstra_of_the_wav(tmp_path):
    tree = make(tmp_path, {"train": PAIRS}, rate=44_100)
    assert tree.streams == (
        StreamSpec("au", "facial", 15),
        StreamSpec("va", "facial", 2),
        StreamSpec("fer", "facial", 8),
        StreamSpec("mfcc", "acoustic", 26),
    )
    person = tree.read(tree.pairs("train")[0]).people["b"]
    together = np.concatenate([person[name] for name in ("au", "va", "fer")], axis=1)
    np.testing.assert_array_equal(together, official.attributes_of(NOXI[1])[:50].astype(np.float16))
    assert person["mfcc"].shape == (50, 26) and person["mfcc"].dtype == np.float16


def test_extracted_streams_come_in_the_official_order_with_the_widths_of_the_data(tmp_path):
    tree = make(tmp_path, {"train": PAIRS}, video=True, audio=True)
    assert {spec.name: spec.width for spec in tree.streams} == official.WIDTHS
    assert [spec.kind for spec in tree.streams] == ["facial"] * 3 + ["acoustic"] * 2
    person = tree.read(tree.pairs("train")[2]).people["a"]
    for name in official.WIDTHS:
        np.testing.assert_array_equal(person[name], official.features_of(UDIVA[0], name)[:50].astype(np.float16))


def test_faces_from_features_go_with_cepstra_from_the_wav_where_only_the_video_was_extracted(tmp_path):
    tree = make(tmp_path, {"train": PAIRS}, video=True)
    assert {spec.name: spec.width for spec in tree.streams} == {"au": 7, "va": 3, "fer": 5, "mfcc": 26}
    assert tree.read(tree.pairs("train")[0]).people["a"]["au"].shape == (50, 7)


def test_751_rows_give_750_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(official, "ROWS", 751)
    tree = make(tmp_path, {"test": (NOXI,)})
    assert tree.frames == 750
    assert tree.read(tree.pairs("test")[0]).people["a"]["mfcc"].shape == (750, 26)


def test_coefficients_with_an_extra_axis_are_the_same(tmp_path):
    tree = make(tmp_path, {"test": (NOXI,)})
    flat = tree.read(tree.pairs("test")[0]).people["a"]["coefficients"]
    official.save(tmp_path / f"test/3D_FV_files/{NOXI[0]}.npy", official.coefficients_of(NOXI[0])[:, None])
    np.testing.assert_array_equal(tree.read(tree.pairs("test")[0]).people["a"]["coefficients"], flat)


@pytest.mark.parametrize(("rows", "kept"), [(ROWS, 50), (ROWS + 2, 50), (ROWS - 1, 50), (ROWS - 2, 49)])
def test_a_sound_stream_may_miss_or_exceed_two_rows_and_its_last_row_fills_up(tmp_path, rows, kept):
    tree = make(tmp_path, {"test": (NOXI,)}, video=True, audio=True)
    w2v = official.features_of(NOXI[0], "w2v", rows)
    official.save_tensors(tmp_path / f"features/test/Audio_features/{NOXI[0]}.pth", [official.features_of(NOXI[0], "mfcc"), w2v])
    read = tree.read(tree.pairs("test")[0]).people["a"]["w2v"]
    np.testing.assert_array_equal(read[:kept], w2v[:kept].astype(np.float16))
    np.testing.assert_array_equal(read[kept:], np.repeat(w2v[-1:].astype(np.float16), 50 - kept, axis=0))


def test_half_precision_tensors_and_tensors_with_gradients_are_read(tmp_path):
    tree = make(tmp_path, {"test": (NOXI,)}, video=True)
    file = tmp_path / f"features/test/Video_features/{NOXI[0]}.pth"
    torch.save([torch.ones(ROWS, 3).half(), torch.ones(ROWS, 7, requires_grad=True), torch.ones(ROWS, 5).bfloat16()], file)
    assert (tree.read(tree.pairs("test")[0]).people["a"]["fer"] == 1).all()


def test_features_saved_by_old_releases_of_pytorch_are_read(tmp_path):
    tree = make(tmp_path, {"test": (NOXI,)}, video=True)
    file = tmp_path / f"features/test/Video_features/{NOXI[0]}.pth"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    read = tree.read(tree.pairs("test")[0]).people["a"]["au"]
    np.testing.assert_array_equal(read, official.features_of(NOXI[0], "au")[:50].astype(np.float16))


def test_splits_are_those_whose_list_exists_in_the_usual_order(tmp_path):
    tree = make(tmp_path, {"test": (NOXI,), "train": (UDIVA,)})
    assert tree.splits == ("train", "test")
    with pytest.raises(ValueError, match="no split 'val'; it has train, test"):
        tree.pairs("val")
    with pytest.raises(ValueError, match=r"none of train\.csv"):
        Tree(tmp_path / "test")


def test_keys_are_slugs_of_the_speaker_and_long_ones_end_in_a_hash(tmp_path):
    long = f"NoXI/{'x' * 90}/Expert_video/1"
    twin = long.replace("/1", "/2")
    tree = make(tmp_path, {"train": (NOXI, ("UDIVA/talk/0 1.2/FC1/8", UDIVA[1]), (long, long + "2"), (twin, twin + "2"))})
    keys = [pair.key for pair in tree.pairs("train")]
    assert keys[:2] == ["NoXI__065_2016-04-14_Nottingham__Expert_video__1", "UDIVA__talk__0-1-2__FC1__8"]
    assert len(keys[2]) == len(keys[3]) == 80 and keys[2] != keys[3]


def test_a_clip_listed_twice_is_refused_with_both_rows(tmp_path):
    make(tmp_path, {"train": (NOXI,)})
    with pytest.raises(ValueError, match=r"train\.csv row 0 .* test\.csv row 1 .* same key"):
        make(tmp_path, {"test": (UDIVA, NOXI)})


@pytest.mark.parametrize("path", ["/etc/x/y/passwd", "NoXI/../../../x", "NoXI/chat/Expert_video", "NoXI/c/P/1/2/3", ""])
def test_a_path_that_is_none_is_refused_with_file_and_row(tmp_path, path):
    official.write_csv(tmp_path / "train.csv", [["", "speaker_path", "listener_path"], [0, path, NOXI[1]]])
    with pytest.raises(ValueError, match=r"train\.csv, row 0"):
        Tree(tmp_path)


def test_a_subject_is_site_chat_and_person_whatever_the_task(tmp_path):
    tree = make(tmp_path, {"train": (NOXI, UDIVA)})
    subjects = [tree.read(pair).meta["subjects"]["a"] for pair in tree.pairs("train")]
    assert subjects == ["NoXI/065_2016-04-14_Nottingham/Expert_video", "UDIVA/023102/FC1"]


def test_one_bad_clip_does_not_hide_the_streams_of_the_others(tmp_path):
    make(tmp_path, {"train": (NOXI, RECOLA)}, video=True)
    for path in NOXI:
        (tmp_path / f"features/train/Video_features/{path}.pth").write_bytes(b"gone")
    tree = Tree(tmp_path)
    assert tree.frames == 50
    assert tree.read(tree.pairs("train")[1]).people["a"]["au"].shape == (50, 7)


def test_a_tree_travels_between_processes_and_reads_the_same(tmp_path):
    tree = make(tmp_path, {"train": (NOXI,)})
    there = pickle.loads(pickle.dumps(tree))
    ours, theirs = (each.read(each.pairs("train")[0]).people for each in (tree, there))
    np.testing.assert_array_equal(ours["b"]["mfcc"], theirs["b"]["mfcc"])


def test_provenance_names_the_source_and_counts_the_pairs(tmp_path):
    tree = make(tmp_path, {"train": (NOXI, UDIVA), "val": (RECOLA,)})
    assert tree.provenance() == {"source": "react2024", "pairs": {"train": 2, "val": 1}}
