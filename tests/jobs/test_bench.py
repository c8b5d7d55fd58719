"""jobs/bench.py as a user runs it."""

from pathlib import Path

import pytest
import yaml

from cluster.data.demo import DYADS
from cluster.studies.kept_scores import read_scores
from jobs import bench
from tests.tiny import call, job, settings

ONLINE = {"model.online": True, "model.denoiser": "transformer", "model.width": 16, "model.layers": 1}
DIRECT = {"model.space": "attributes", "model.denoiser": "transformer", "model.width": 16, "model.layers": 1}
DIRECT |= {"diffusion.ema_every": 12, "optim.lr.diffusion": 1e-2}
PLAIN = {"diffusion.prediction": "epsilon", "diffusion.sampling_steps": 20}
"""A family without a diffusion leaves its fields as they are."""


@pytest.mark.starts
def test_online_prints_how_much_faster_than_real_time_a_listener_is() -> None:
    small = [f"{key}={str(value).lower()}" for key, value in ONLINE.items()]
    done = job(
        "bench", "online", "--seconds", "4", "--count", "2", "model.hidden=16", "model.latent=8", "diffusion.sampling_steps=2", *small
    )
    assert "2 listeners online, 2 chunks of 2 s" in done.stdout and "slowest chunk" in done.stdout


def test_the_demo_s_clips_are_as_long_as_what_is_measured() -> None:
    assert bench.SIMULATED.frames == DYADS.frames


def test_checkpoint_prints_what_a_step_waits_for_beside_a_plain_copy() -> None:
    said = call("bench", "checkpoint", "--size", "2", "--rounds", "1").stdout
    rows = [line.split("│")[1:-1] for line in said.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["copy", "begin", "publish", "finish", "together"]
    assert [float(cell) for cell in rows[0][2::2]] == [1, 1, 1] and all(float(row[1]) >= 0 for row in rows)
    assert "30 ms for each of" in " ".join(said.split())


@pytest.mark.slow
def test_recovery_kills_ranks_of_a_run_and_of_an_empty_loop(shards: Path, tmp_path: Path) -> None:
    done = job("bench", "recovery", "--kills", "1", *settings(shards, tmp_path / "store"), "optim.epochs=1000", "workers.count=2")
    assert "from the SIGKILL of one of 2 ranks to the end of the next step, 1 kills of each" in " ".join(done.stdout.split())
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["a run", "an empty loop, stock Ray Train"]
    assert all(float(cell) > 0 for row in rows for cell in row[1:]) and float(rows[1][-1]) == 1
    lost = [line for line in done.stdout.splitlines() if line.startswith("stage autoencoder failed (lost)")]
    assert len(lost) == 1, "the rank was killed, and the run went on"


@pytest.mark.slow
def test_startup_measures_both_ends_of_a_run_and_of_an_empty_loop(shards: Path, tmp_path: Path) -> None:
    done = job("bench", "startup", "--rounds", "1", *settings(shards, tmp_path / "store"))
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == 2 * ["a run", "an empty loop, stock Ray Train"]
    assert all(float(cell) > 0 for row in rows for cell in row[1:]) and float(rows[1][-1]) == float(rows[3][-1]) == 1


@pytest.mark.slow
def test_data_are_read_from_a_server_of_their_own_beside_the_wire_and_webdataset(tmp_path: Path) -> None:
    done = job("bench", "data", "--stage", "diffusion", "--size", "1", "--rounds", "1", "model.latent=8", cwd=tmp_path)
    assert "latents of 200 frames x 8, batches of 8" in done.stdout and "SeaweedFS" in done.stdout
    head, *rows = [line.split("│" if "│" in line else "┃")[1:-1] for line in done.stdout.splitlines() if line.startswith(("│", "┃"))]
    assert [cell.strip() for cell in head] == ["", "wire", "ours", "/ wire", "webdataset", "/ wire"]
    assert len(rows) == 8 and all(float(cell) > 0 for row in rows for cell in row[1:])


@pytest.mark.slow
def test_science_trains_every_row_shares_autoencoders_writes_the_table_and_takes_up_what_is_kept(shards: Path, tmp_path: Path) -> None:
    rows = {
        "first": {"evaluation.baselines": True, "model.online": True},
        "transformer": ONLINE,
        "transformer, drawn otherwise": {**ONLINE, "diffusion.sampler": "dpm++"},
        "perfrdiff": {"model.family": "perfrdiff", "model.online": True, "model.width": 16, "model.layers": 1},
        "belfusion": {"model.family": "belfusion", "model.latent": 1, "model.width": 16, "model.layers": 2},
        "trans-vae": {"model.family": "trans-vae", "model.width": 16, "model.layers": 1, **PLAIN},
        "direct": DIRECT,
        "direct, longer averages": {**DIRECT, "diffusion.ema_length": 0.1},
        "direct, guided": {**DIRECT, "diffusion.autoguidance": 2.0, "diffusion.weak_progress": 24},
    }
    file, page = tmp_path / "compared.yaml", tmp_path / "page.md"
    overrides = {"evaluation.baselines": False, "evaluation.clips": 3}
    file.write_text(yaml.safe_dump({"name": "compared", "experiment": {}, "seeds": [0], "overrides": overrides, "rows": rows}))
    page.write_text("before\n<!-- table -->\nyesterday\n<!-- table -->\nafter\n<!-- pairs -->\n<!-- pairs -->\n")
    told = ["--against", "direct", "--picture", tmp_path / "made" / "frontier.png"]
    command = ["science", "--config", file, "--write", page, *told, "--scores", tmp_path / "scores"]
    done = job("bench", *command, *settings(shards, tmp_path / "store"))
    assert done.stdout.count("stage autoencoder is that of run compared-") == 1
    text = page.read_text()
    assert "yesterday" not in text and text.startswith("before\n<!-- table -->\n|")
    assert "|\n<!-- table -->\nafter\n<!-- pairs -->\n|" in text
    pairs = text.partition("<!-- pairs -->")[2]
    assert "| units cut at 0.5 (direct, guided) |" in pairs and "mimic" not in pairs, "models alone, and their draws with units cut"
    assert (tmp_path / "made" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    for row in (
        *rows,
        "wrong speaker (first)",
        "mimic",
        "online retrieval 50",
        "oracle of turns",
        "oracle",
        "online oracle 50",
        "online oracle 50 mean of 4",
    ):
        assert f"| {row} |" in text
    assert done.stdout.count("items, weights") == 9, "stages that were trained"
    kept = {run.name: run.rows["model"].values.tolist() for run in read_scores(tmp_path / "scores" / "compared.json").values()}
    assert kept["transformer, seed 0"] != kept["transformer, drawn otherwise, seed 0"], "of one run, and each has scores of its own"
    drawn = [kept[f"{row}, seed 0"] for row in rows if row.startswith("direct")]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0], "by weights that were averaged and exported afterwards"
    for store, scores in (("store", "none"), ("other store", "scores")):  # a run that is there, and scores of one that is nowhere
        again = job("bench", *command[:-1], tmp_path / scores, *settings(shards, tmp_path / store))
        assert page.read_text() == text and "items, weights" not in again.stdout, "nothing is trained twice"
