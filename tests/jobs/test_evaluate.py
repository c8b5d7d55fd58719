"""jobs/evaluate.py as people use it: scores of a run, scores of arrays, and what it says when there is nothing to score."""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save

from cluster.cli import run
from cluster.storage import content_hash
from jobs.evaluate import main
from reactdiff.metrics.official import EXTRA, OFFICIAL, REPAIRED
from tests.tiny import ROOT, call, job

ARRAYS = ROOT / "tests/data/metrics"
EXPECTED = json.loads((ARRAYS / "expected.json").read_text())
NAMES = {"FRCorr": "FRC", "FRDist": "FRD"}


def evaluate(*arguments: object) -> int:
    """The exit code of the command."""
    try:
        return run(lambda: main([str(argument) for argument in arguments]))
    except SystemExit as error:  # of argparse
        return int(error.code or 0)


@pytest.mark.starts
def test_arrays_get_the_official_values_as_json_and_nothing_else_on_stdout() -> None:
    done = job("evaluate", "--arrays", ARRAYS / "m_short.npz", "--json")
    _assert_official(json.loads(done.stdout), "m_short")
    assert "5 of 5 clips" in done.stderr


@pytest.mark.parametrize("name", ["m_plain", "m_const"])
def test_arrays_get_the_official_values(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--arrays", ARRAYS / f"{name}.npz", "--json") == 0
    _assert_official(json.loads(capsys.readouterr().out), name)


def _assert_official(printed: dict[str, dict[str, float]], name: str) -> None:
    assert printed.keys() == {"official", "repaired", "extra", "intervals"}
    assert tuple(printed["repaired"]) == REPAIRED and tuple(printed["official"]) == OFFICIAL and tuple(printed["extra"]) == EXTRA
    assert all(name in printed["intervals"] for name in EXTRA if name != "FrechetAttributes")
    for metric, value in printed["official"].items():
        assert value == pytest.approx(EXPECTED[name][NAMES.get(metric, metric)], rel=1e-6), metric


def test_arrays_get_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--arrays", ARRAYS / "m_short.npz") == 0
    said = capsys.readouterr().out
    assert all(metric in said for metric in OFFICIAL) and f"{EXPECTED['m_short']['FRD']:.2f}" in said


@pytest.mark.usefixtures("local_ray")
def test_a_finished_evaluation_is_repeated_from_its_parts(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (report,) = (finished / "evaluation").glob("test-*.json")
    parts = {part: part.stat().st_mtime_ns for part in finished.glob("evaluation/*/*")}
    assert evaluate(finished, "--split", "test", "--json") == 0
    printed, kept = json.loads(capsys.readouterr().out), json.loads(report.read_text())
    assert printed["scores"] == kept["scores"]
    assert (printed["run"], printed["split"], printed["predictions"], printed["progress"]) == (str(finished), "test", 2, 40)
    assert {part: part.stat().st_mtime_ns for part in finished.glob("evaluation/*/*")} == parts


@pytest.mark.usefixtures("local_ray")
def test_a_run_whose_store_was_moved_is_scored_on_as_much_as_asked_for(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.parent.parent, tmp_path / "store")
    assert evaluate("tiny", "--store", tmp_path / "store", "--split", "test", "--clips", 2, "--predictions", 1) == 0
    said = capsys.readouterr().out
    assert "FRCorr" in said and "mean reaction" in said and "repaired" in said
    reports = [json.loads(file.read_text()) for file in (tmp_path / "store/runs/tiny/evaluation").glob("test-*.json")]
    assert sorted((report["clips"], report["predictions"]) for report in reports) == [(2, 1), (8, 2)]


@pytest.mark.usefixtures("local_ray")
def test_mistakes_are_explained(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ((), "name a run to score, or --arrays"),
        (("x", "--arrays", "y.npz"), "one of the two"),
        (("--arrays", "y.npz", "--clips", 3), "with --arrays all of the file is"),
        (("--arrays", tmp_path / "none.npz"), "none.npz does not exist"),
        (("x", "--predictions", 0), "'0' should be a whole number of at least 1"),
        (("none", "--store", tmp_path), "there is no run at"),
        ((finished, "--split", "gate"), "the dataset has no split 'gate'; it has test, train"),
        ((finished, "--split", "train"), "split 'train' has no appropriateness matrix"),
    ):
        assert evaluate(*arguments) != 0
        said, error = capsys.readouterr()
        assert not said and re.search(message, error), (arguments, error)


def test_help_teaches_with_examples() -> None:
    text = call("evaluate", "--help").stdout
    assert "jobs/evaluate.py --arrays reactions.npz --json" in text and "--predictions K" in text


@pytest.mark.usefixtures("local_ray")
def test_a_run_is_scored_with_another_sampler_beside_its_own_and_with_nothing_else(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.parent.parent, tmp_path / "store")
    asked = ("tiny", "--store", tmp_path / "store", "--split", "test", "--json")
    for overrides in (["diffusion.sampler=dpm++", "diffusion.sampling_steps=2"], []):
        assert evaluate(*asked, *overrides) == 0
    scores = [json.loads(text) for text in capsys.readouterr().out.replace("}\n{", "}\0{").split("\0")]
    assert [one["otherwise"] for one in scores] == [{"sampler": "dpm++", "sampling_steps": 2}, {}] and scores[0]["clips"] == 8
    assert scores[0]["scores"]["model"] != scores[1]["scores"]["model"] and scores[0]["scores"]["mimic"] == scores[1]["scores"]["mimic"]
    assert len(list((tmp_path / "store/runs/tiny/evaluation").glob("test-*.json"))) == 2
    assert evaluate(*asked, "diffusion.schedule=linear") == 1
    assert "diffusion.schedule=linear: a trained run can be asked with other diffusion.sampler" in capsys.readouterr().err
    exports = tmp_path / "store/runs/tiny/exports/diffusion"
    (last,) = exports.glob("*.json")
    export = json.loads(last.read_text())
    (exports / f"{5:015d}.json").write_text(json.dumps(export | {"progress": 5}))
    assert evaluate(*asked, "diffusion.autoguidance=2", "diffusion.weak_progress=5") == 0
    guided = json.loads(capsys.readouterr().out)["scores"]["model"]
    assert guided["official"] == pytest.approx(scores[1]["scores"]["model"]["official"], rel=1e-3), "by itself, a model is not changed"
    weights = load_file(exports / f"{export['hash']}.safetensors")
    weak = save({name: 0.9 * one if one.is_floating_point() else one for name, one in weights.items()})
    (exports / f"{content_hash(weak)}.safetensors").write_bytes(weak)
    (exports / f"{6:015d}.json").write_text(json.dumps(export | {"progress": 6, "hash": content_hash(weak)}))
    assert evaluate(*asked, "diffusion.autoguidance=2", "diffusion.weak_progress=6") == 0
    assert json.loads(capsys.readouterr().out)["scores"]["model"]["official"] != pytest.approx(guided["official"], rel=1e-3)
    assert evaluate(*asked, "diffusion.autoguidance=2", "diffusion.weak_progress=7") == 1
    assert "no such earlier export of these latents; earlier ones are: 5, 6. A stage leaves one where" in capsys.readouterr().err
    assert evaluate(*asked, "diffusion.guidance=3") == 1
    assert "never trained without the speaker cannot be guided" in capsys.readouterr().err
