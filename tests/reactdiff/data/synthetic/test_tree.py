import json

import numpy as np
import pytest

from reactdiff.data.react2024 import Tree
from reactdiff.data.sample import StreamSpec
from reactdiff.data.synthetic import Simulation, oracle, write_tree
from reactdiff.data.synthetic.dyad import INDEX
from reactdiff.data.synthetic.simulation import behaviour, dyad

SMALL = Simulation(seed=1, frames=50, clips={"train": 6, "test": 3}, sharing=2)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("official")
    write_tree(SMALL, root, workers=1)
    return Tree(root)


def contents(root):
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def test_the_official_reader_reads_every_clip(tree):
    assert tree.splits == ("train", "test") and tree.frames == 50
    assert tree.streams == (
        StreamSpec("au", "facial", 64),
        StreamSpec("va", "facial", 8),
        StreamSpec("fer", "facial", 16),
        StreamSpec("mfcc", "acoustic", 26),
    )
    for split in tree.splits:
        for number, pair in enumerate(tree.pairs(split)):
            clip = tree.read(pair)
            for person, face in zip("ab", dyad(SMALL, split, number), strict=True):
                np.testing.assert_allclose(clip.people[person]["attributes"], face.attributes[:50], atol=1e-6)
                assert np.abs(clip.people[person]["coefficients"]).max() < 5


@pytest.mark.starts
def test_the_same_simulation_is_the_same_bytes_whatever_the_processes(tree, tmp_path):
    write_tree(SMALL, tmp_path, workers=2)
    assert contents(tmp_path) == contents(tree.root)


def test_a_dataset_grows_and_its_first_clips_stay(tree, tmp_path):
    write_tree(Simulation(seed=1, frames=50, clips={"train": 2}, sharing=2), tmp_path, workers=1)
    write_tree(SMALL, tmp_path, workers=1)
    assert contents(tmp_path) == contents(tree.root)


def test_writing_resumes_where_it_was_cut_off(tree, tmp_path):
    write_tree(SMALL, tmp_path, workers=1)
    victim = sorted(tmp_path.rglob("*.pth"))[3]
    victim.unlink()
    untouched = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.wav")}
    seen = []
    write_tree(SMALL, tmp_path, progress=lambda done, count: seen.append((done, count)), workers=1)
    assert seen == [(8, 9), (9, 9)]
    assert contents(tmp_path) == contents(tree.root)
    assert sum(file.stat().st_mtime_ns != then for file, then in untouched.items()) == 2


def test_no_split_is_listed_before_its_clips_are_there(tmp_path, monkeypatch):
    def fail(done, count):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tree(SMALL, tmp_path, progress=fail, workers=1)
    with pytest.raises(ValueError, match="no REACT 2024 tree"):
        Tree(tmp_path)


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"frames": 100}, {"sharing": 3}, {"clips": {"train": 5, "test": 3}}, {"clips": {"train": 6, "val": 3}}]
)
def test_a_folder_of_another_simulation_is_refused(tree, other):
    settings = {"seed": 1, "frames": 50, "clips": {"train": 6, "test": 3}, "sharing": 2} | other
    before = (tree.root / "simulator.json").read_text()
    with pytest.raises(ValueError, match="only `clips` may grow"):
        write_tree(Simulation(**settings), tree.root)
    assert (tree.root / "simulator.json").read_text() == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="not empty"):
        write_tree(SMALL, tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"frames": 60}, {"frames": 0}, {"clips": {}}, {"clips": {"train": 0}}, {"clips": {"dev": 3}}, {"sharing": 0}]
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="simulation"):
        Simulation(**wrong)


def test_clips_of_one_script_are_appropriate_for_each_other_in_their_own_direction(tree):
    same = np.kron(np.eye(3, dtype=bool), np.ones((2, 2), bool))
    expected = np.block([[same, np.zeros_like(same)], [np.zeros_like(same), same]])
    np.testing.assert_array_equal(tree.appropriateness("train"), expected)
    test = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
    np.testing.assert_array_equal(tree.appropriateness("test"), np.kron(np.eye(2, dtype=bool), test))


def test_clips_that_share_a_script_play_it_differently_and_show_different_people():
    simulation = Simulation(frames=200, clips={"train": 32})
    floors = []
    for clip in range(32):
        events = behaviour(simulation, "train", clip)[0]
        floors.append(len(events[events[:, 2] == INDEX["talk"]]))
    assert all(len(set(floors[start : start + 4])) == 1 for start in range(0, 32, 4))
    faces = [dyad(simulation, "train", clip)[0].attributes for clip in range(4)]
    assert all(not np.array_equal(faces[0], other) for other in faces[1:])
    chats = [simulation.paths("train", clip)[0].rpartition("/")[0] for clip in range(32)]
    assert all(len(set(chats[start : start + 4])) == 4 for start in range(0, 32, 4)) and len(set(chats)) == 8


def test_scripts_and_people_of_one_split_are_not_in_another():
    simulation = Simulation(frames=200, clips={"train": 12, "val": 12, "gate": 12, "test": 12})
    people, talks = {}, {}
    for split in simulation.splits:
        places = range(simulation.clips[split])
        people[split] = {simulation.paths(split, clip)[0].rpartition("/")[0] for clip in places}
        talks[split] = {behaviour(simulation, split, clip)[0][:4].tobytes() for clip in places}
    for what in (people, talks):
        assert len(set.union(*what.values())) == sum(len(each) for each in what.values())


def test_who_talks_is_heard_and_stress_is_louder(tree):
    rows = []
    for number, pair in enumerate(tree.pairs("train")):
        clip = tree.read(pair)
        for person, face in zip("ab", dyad(SMALL, "train", number), strict=True):
            loudness = clip.people[person]["mfcc"][:, :1].astype(np.float64)
            rows.append(np.concatenate([loudness, face.activations[:50, [INDEX["talk"], INDEX["stress"]]]], axis=1))
    loudness, talk, stress = np.concatenate(rows).T
    assert loudness[(talk > 0.8) & (stress > 0.7)].mean() > loudness[(talk > 0.8) & (stress < 0.1)].mean() + 0.3
    assert loudness[talk > 0.8].mean() > 1.5 > 0.01 > loudness[talk < 0.01].mean()


def test_the_oracle_needs_nothing_but_the_provenance(tree):
    provenance = json.loads(json.dumps(tree.provenance()))
    key = tree.pairs("test")[1].key
    draws = oracle(provenance, key, 1, 3)
    assert draws.shape == (3, 50, 25) and draws.dtype == np.float32
    np.testing.assert_array_equal(oracle(provenance, key, 1, 2), draws[:2])
    assert not np.array_equal(draws[0], draws[1])
    assert not np.array_equal(oracle(provenance, key, 0, 1)[0], draws[0])


def test_the_oracle_says_what_it_cannot_do(tree):
    with pytest.raises(ValueError, match="only simulated data"):
        oracle({"source": "react2024"}, "x", 0, 1)
    with pytest.raises(ValueError, match="not of this simulation"):
        oracle(tree.provenance(), "x", 0, 1)
    with pytest.raises(ValueError, match="direction is 2"):
        oracle(tree.provenance(), tree.pairs("test")[0].key, 2, 1)
    old = tree.provenance() | {"simulator": {"version": 0}}
    with pytest.raises(ValueError, match="version 0"):
        oracle(old, tree.pairs("test")[0].key, 0, 1)


def test_the_provenance_of_a_simulated_tree_says_how_it_was_made(tree):
    assert Simulation.of(tree.provenance()["simulator"]) == SMALL
