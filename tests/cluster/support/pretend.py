"""A driver that trains nothing, for tests of what watches drivers: it has a lease, lives, rows, an endpoint and a rank that can be killed.

  python -m tests.cluster.support.pretend STORE DATA TARGETS STEPS

`WRONG_ROWS=1` in its environment makes it train on other items after a restart, which no real driver may.
"""

import json
import os
import subprocess
import sys
import time

from cluster.cli import run as run_job
from cluster.runs import lease
from cluster.runs.state import open_life
from cluster.runtime.failures import TABLE, StageFailed
from cluster.storage import NotFound, Store, content_hash, open_store
from cluster.telemetry.exporter import Exporter
from cluster.telemetry.meter import Meter
from cluster.telemetry.metrics_log import MetricsLog

STAGE, BATCH, EVERY, PACE = "autoencoder", 6, 20, 0.05
HASH = "f" * 32
DATA = next(failure for failure in TABLE if failure.name == "data")


def main() -> int:
    """Bring the pretended stage to its end."""
    lease.BEAT, lease.LAPSE, lease.LOOK = 0.5, 3.0, 0.2
    store, data = open_store(f"{sys.argv[1]}/runs/proof"), open_store(sys.argv[2])
    steps = int(sys.argv[4])
    with lease.Lease(store, "pretend", "--no-wait" not in sys.argv) as held:
        life, attempt = open_life(store, {}), 0
        exporter = Exporter("proof", life)
        exporter.write_target(sys.argv[3])
        meter, rank, items = Meter(0, 1, STAGE), subprocess.Popen(["sleep", "600"]), 0
        step = _saved(store)
        log = MetricsLog(store, life, attempt, STAGE)
        while step < steps:
            held.assert_held()
            time.sleep(PACE)
            if rank.poll() is not None:
                exporter.restarts("lost")
                attempt, rank, step = attempt + 1, subprocess.Popen(["sleep", "600"]), _saved(store)
                log = MetricsLog(store, life, attempt, STAGE)
            step += 1
            items += BATCH
            wrong = bool(os.environ.get("WRONG_ROWS")) and life + attempt > 1
            log.add(progress=step * BATCH, loss=1.0 / step, ledger=step + wrong)
            meter.gauges["progress_items"] = step * BATCH
            meter.step_done(items=BATCH)
            exporter.update(meter.snapshot() | {"pid": rank.pid})
            if step % EVERY == 0:
                if content_hash(data.read("shard.tar")) != data.read("hash").decode():
                    raise StageFailed(STAGE, DATA, ValueError("the bytes are others"))
                log.flush()
                store.put("saved", str(step).encode())
        log.flush()
        described = {"stage": STAGE, "progress": steps * BATCH, "hash": HASH, "dataset": "", "seed": 0, "frames": 1, "version": 2}
        described |= {"streams": [], "model": {}, "diffusion": {}}
        store.put(f"exports/{STAGE}/{steps * BATCH:015d}.json", json.dumps(described).encode())
    return 0


def _saved(store: Store) -> int:
    try:
        return int(store.read("saved"))
    except NotFound:
        return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
