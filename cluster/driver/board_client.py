"""The driver's side of the board: each question has ten seconds, and a board that answers none for a minute is killed."""

import datetime
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.driver.board import Board
from cluster.telemetry.meter import Snapshot
from cluster.training.requests import Request

ANSWER = 10.0
"""Seconds that the board is given to answer, before it is said that it does not. It answers in milliseconds."""

UNANSWERED = 6
"""So many times in a row it may not, before its process is killed."""

STARTING = 30
"""The same of one whose process starts, on a machine that may be busy."""

WHO = "the process through which driver and ranks speak"


class BoardClient:
    """What the driver asks of a board.

    Args:
        actor: the board.
        say: takes what is to be said of one that does not answer.

    Attributes:
        actor: the board, for those who ask it themselves.
    """

    def __init__(self, actor: Any, say: Callable[[str], None]):
        self.actor, self._say = actor, say
        self._silences, self._patience = 0, STARTING
        self._taking: Any = None

    @classmethod
    def start(cls, say: Callable[[str], None]) -> "BoardClient":
        """A board on the machine of this process."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(Board.options(scheduling_strategy=here).remote(), say)  # type: ignore[attr-defined]

    def begin(self, attempt: int, meanwhile: Callable[[], None]) -> None:
        """Only ranks of this attempt are heard from now on.

        Args:
            attempt: the start of the ranks.
            meanwhile: called while there is no answer; raises if there is no need of one any more.

        Raises:
            RayError: if the board is gone; one that does not answer is killed.
        """
        self._taking, question = None, self.actor.begin.remote(attempt)
        while True:
            try:
                ray.get(question, timeout=ANSWER)
            except GetTimeoutError:
                meanwhile()
                self._unanswered()
            else:
                return self._answered()

    def take(self, request: Request) -> tuple[list[Snapshot], bytes | None] | None:
        """What the board has for the driver, whose request it has from now on; None while it does not answer, or Ray is ending.

        Raises:
            ActorDiedError: if it is gone.
        """
        if self._taking is None:  # else the answer is still to come, and what is in it will not come again
            self._taking = self.actor.take.remote(request)
        try:
            taken = ray.get(self._taking, timeout=ANSWER)
        except GetTimeoutError:
            self._unanswered()
            return None
        except ActorDiedError:
            raise
        except RayError:
            self._taking = None
            return None
        self._taking = None
        self._answered()
        return taken

    def places(self) -> tuple[float, float, float] | None:
        """`Board.places`; None where there is no answer: who has not answered before is not asked."""
        if not self._silences:
            with suppress(RayError):
                return ray.get(self.actor.places.remote(), timeout=ANSWER)
        return None

    def ask(self, request: Request) -> None:
        """Ask this of the ranks now, if the board answers."""
        with suppress(RayError):
            ray.get(self.actor.ask.remote(request), timeout=ANSWER)

    def decide(self, again: bool) -> None:
        """Answer Ray Train, if the board does; it learns in its own way that the board is gone."""
        with suppress(RayError):
            ray.get(self.actor.decide.remote(again), timeout=ANSWER)

    def close(self) -> None:
        """The driver leaves."""
        self.actor.close.remote()

    def _answered(self) -> None:
        self._silences, self._patience = 0, UNANSWERED

    def _unanswered(self) -> None:
        """Its process is there and does not answer: that is said, and after a while it is killed, which has a way out.

        Counted in questions, not in time: a driver that was frozen itself has heard nothing either.
        """
        self._silences += 1
        if self._silences == 1:
            since = datetime.datetime.now() - datetime.timedelta(seconds=ANSWER)
            self._say(f"{WHO} has not answered since {since:%H:%M:%S}: it is waited for")
        if self._silences >= self._patience:
            self._say(f"{WHO} has not answered for {self._silences * ANSWER:.0f} s: killing it")
            ray.kill(self.actor)
