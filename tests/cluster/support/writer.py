"""A small process that does what a driver does to a run's folder, for tests that stop and kill real ones.

  python -m tests.cluster.support.writer FOLDER LOG END SECONDS

It takes the lease, a life, an attempt, and commits a checkpoint at every step; each of its writes is a line of LOG, after it was done:
seconds of the machine's clock, life, operation, key. The times of the lease are a twentieth of the real ones. Its clock is wrong by
SECONDS. CUT, a signal, cuts it off from the folder until MEND: then every operation waits, and its threads go on.
"""

import datetime
import json
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from cluster.runs import checkpoint, lease
from cluster.runs.checkpoint_writer import CheckpointWriter
from cluster.runs.inventory import remove_orphans
from cluster.runs.lease import Lease
from cluster.runs.lineage import open_attempt
from cluster.runs.retention import Retention
from cluster.runs.state import Attempt, State, Superseded, assert_newest_life, open_life, write_state
from cluster.storage.folder import FolderStore
from tests.cluster.support.interleaving import WRITES

STAGE = "autoencoder"
STEP = 6
CUT, MEND = signal.SIGUSR1, signal.SIGUSR2
OPERATIONS = ("get", "size", "list", "put", "create", "replace", "delete")


class LoggedStore(FolderStore):
    """A folder that logs what is written to it, and may be out of reach."""

    linked = threading.Event()

    def log_to(self, path: Path) -> "LoggedStore":
        """Log to this file from now on."""
        self._log, self.by = open(path, "a", buffering=1), Attempt(0, -1)
        return self

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return partial(self._logged, name, value) if name in OPERATIONS else value

    def _logged(self, name: str, operation: Any, key: str = "", *given: Any) -> Any:
        self.linked.wait()
        done = operation(key, *given)
        if name in WRITES:
            print(json.dumps([time.monotonic(), [*self.by], name, key]), file=self._log)
        return done


def main(folder: str, log: str, end: int, wrong: float) -> None:
    """Bring the stage to its end, or find out that somebody else does."""
    LoggedStore.linked.set()
    signal.signal(CUT, lambda *_: LoggedStore.linked.clear())
    signal.signal(MEND, lambda *_: LoggedStore.linked.set())
    lease.datetime = SimpleNamespace(UTC=datetime.UTC, datetime=SimpleNamespace(now=lambda zone: _now(zone, wrong)))
    lease.BEAT, lease.LAPSE, lease.LOOK = 0.25, 1.5, 0.05
    store = LoggedStore(Path(folder)).log_to(Path(log))
    with Lease(store, "writer") as held:
        held.assert_held()
        life = open_life(store, {})
        store.by = Attempt(life, -1)
        state = State("RUNNING", life, "", "")
        write_state(store, state)
        store.by = by = Attempt(life, open_attempt(store, life))
        remove_orphans(store, STAGE, by)
        writer = CheckpointWriter(store, lambda value: [value], 0, Retention(2), partial(assert_newest_life, store, *by))
        found = [checkpoint.read_manifest(store, key) for key in checkpoint.list_checkpoints(store, STAGE)]
        progress = max((one.progress for one in found), default=0)
        while progress < end:
            progress += STEP
            weights = SimpleNamespace(name="w", shape=(2,), start=0, tensors={"master": torch.full((2,), float(progress))})
            facts = {"stage": STAGE, "progress": progress, "steps": progress // STEP, "dataset": "", "config": {}}
            writer.begin([weights], {}, **facts, life=by.life, attempt=by.attempt)
            writer.commit()
        writer.close()
        held.assert_held()
        write_state(store, State("DONE", life, "", ""))


def _now(zone: datetime.tzinfo, wrong: float) -> datetime.datetime:
    return datetime.datetime.now(zone) + datetime.timedelta(seconds=wrong)


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    except Superseded as error:
        sys.exit(str(error))
