"""The actor through which a stage's driver and its ranks speak: numbers come from the ranks, requests and decisions from the driver."""

import time

import ray

from cluster.telemetry.meter import Snapshot
from cluster.training.requests import Request


@ray.remote(num_cpus=0)
class Board:
    """Where ranks leave their latest numbers and find what is asked of them, and Ray Train what to do about a failure.

    One lives beside the driver for as long as a group of ranks. Ranks of an attempt that is over are not heard any more.
    """

    def __init__(self) -> None:
        self._attempt, self._request = -1, Request.NOTHING
        self._latest: dict[int, Snapshot] = {}
        self._error: bytes | None = None
        self._decided: bool | None = None
        self._closed = False
        self._asked = self._without = self._given_back = 0.0

    def begin(self, attempt: int) -> None:
        """The driver starts the ranks: only this attempt is heard from now on."""
        self._attempt, self._request, self._latest = attempt, Request.NOTHING, {}

    def attempt(self) -> int:
        """Which start of the ranks the present one is."""
        return self._attempt

    def post(self, attempt: int, snapshot: Snapshot) -> Request:
        """Leave a rank's numbers; its later ones replace them. Returns what is asked of it."""
        if attempt != self._attempt:
            return Request.NOTHING
        self._latest[snapshot["rank"]] = snapshot
        return self._request

    def take(self, request: Request) -> tuple[list[Snapshot], bytes | None]:
        """Take what was left since the last call, and ask this from now on; with it, the error that waits for a decision."""
        taken, self._latest, self._request = list(self._latest.values()), {}, request
        error, self._error = self._error, None
        return taken, error

    def ask(self, request: Request) -> None:
        """Ask this from now on, and take nothing."""
        self._request = request

    def asked(self) -> None:
        """Ray is asked for the ranks' places now: for the first time, or again after a failure."""
        now = time.time()
        self._asked = self._asked or now
        self._without += now - (self._given_back or now)
        self._given_back = 0.0

    def placed(self, seconds: float) -> None:
        """Ray has given them, so long after it was asked."""
        self._without += seconds

    def given_back(self) -> None:
        """Ray has them back now."""
        self._given_back = time.time()

    def places(self) -> tuple[float, float, float]:
        """When Ray was first asked for places, the seconds since without them, and when it had them back; 0 where that has not been."""
        return self._asked, self._without, self._given_back

    def failed(self, error: bytes) -> None:
        """Ray Train has seen the ranks fail, and waits for a decision; of the pickled error nothing is imported here."""
        self._error, self._decided = error, None

    def decide(self, again: bool) -> None:
        """Whether the ranks are started again where they were."""
        self._decided = again

    def decided(self) -> bool | None:
        """The decision, None while there is none."""
        return False if self._closed else self._decided

    def close(self) -> None:
        """The driver has left: nothing is started again."""
        self._closed = True
