"""The whole chain in its other homes: an S3 server, a cluster that was there before, under the eyes of a Prometheus."""

import json
from contextlib import closing
from pathlib import Path

import pytest

from cluster.storage import open_store
from tests.cluster.runtime.test_ray_cluster import Shell, shell  # noqa: F401
from tests.cluster.telemetry.test_prometheus import Server
from tests.tiny import ROOT, job, settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DEMO = str(ROOT / "jobs/configs/demo.yaml")


def weights(url: str) -> dict[str, str]:
    """Stage -> content hash of the exported weights of a run's folder."""
    store = open_store(url)
    exports = [json.loads(store.read(entry.key)) for entry in store.list("exports/") if entry.key.endswith(".json")]
    return {export["stage"]: export["hash"] for export in exports}


def test_shards_latents_checkpoints_and_runs_in_s3_give_the_weights_of_the_folder(finished: Path, shards: Path, s3_url: str) -> None:
    job("prepare", "react2024", shards.parent / "tree", f"{s3_url}/shards", "--clips-per-shard", "6")
    here = [*settings(f"{s3_url}/shards", f"{s3_url}/store"), f"telemetry.targets={shards.parent / 'targets'}"]
    job("train", "--config", DEMO, "run.name=tiny", *here)
    run = f"{s3_url}/store/runs/tiny"
    assert json.loads(open_store(run).read("state.json"))["status"] == "DONE"
    assert len(list(open_store(f"{s3_url}/store").list("latents/"))) > 3
    assert weights(run) == weights(str(finished)) and len(weights(run)) == 2


@pytest.mark.ci
def test_ray_start_and_job_submit_bring_the_run_to_done(finished: Path, shards: Path, tmp_path: Path, shell: Shell) -> None:  # noqa: F811
    """The two commands of the README, after a local run of the same user."""
    shell.job_address()
    command = ["python", "jobs/train.py", "--config", "jobs/configs/demo.yaml", "run.name=tiny", *settings(shards, tmp_path)]
    with shell.cluster() as (_, dashboard):
        said = shell.submit(dashboard, *command, cwd=ROOT, timeout=600)
    assert "succeeded" in said and "What to type next" in said and "PreemptionWatcher" not in said
    assert json.loads((tmp_path / "runs/tiny/state.json").read_text())["status"] == "DONE"
    assert weights(str(tmp_path / "runs/tiny")) == weights(str(finished))


def test_a_real_prometheus_sees_items_phases_bytes_and_loss_of_a_run(shards: Path, tmp_path: Path) -> None:
    with closing(Server(tmp_path)) as prometheus:
        here = [*settings(shards, tmp_path / "store"), "run.name=watched", "optim.epochs=8", f"telemetry.targets={prometheus.targets}"]
        job("train", "--config", DEMO, "--stage", "autoencoder", *here)
        run = '{run="watched",stage="autoencoder"}[10m]'
        prometheus.sees(f"max_over_time(reactdiff_items_processed_total{run})", {"320"})
        prometheus.sees(f"max_over_time(reactdiff_progress_items{run})", {"320"})
        forward = '{run="watched",phase="forward"}[10m]'
        prometheus.sees(f"max_over_time(reactdiff_step_seconds_count{forward})", {str(2 * 54)})  # 54 steps of 6 items on 2 ranks
        for name in ("read_bytes_total", "loss", "flops_total"):
            assert min(map(float, prometheus.values(f"max_over_time(reactdiff_{name}{run})"))) > 0, name
        for state in ("starting", "compute", "checkpoint"):  # others, as recovery, are told as well, and are zero
            spent = f'{{run="watched",stage="autoencoder",state="{state}"}}[10m]'
            assert min(map(float, prometheus.values(f"max_over_time(reactdiff_goodput_seconds_total{spent})"))) > 0, state
        assert min(map(float, prometheus.values(f"max_over_time(reactdiff_read_bytes_total{run})"))) > 1e6
