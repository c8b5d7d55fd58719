"""A worker group on its machines: started, watched, asked to leave, and started again where it was."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from threading import Lock
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayError
from ray.train import WorkerGroupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.driver.berths import Berths
from cluster.driver.board_client import WHO, BoardClient
from cluster.driver.interruption import Interruption
from cluster.driver.ray_train import Fit
from cluster.driver.watchdog import Hang, Watchdog
from cluster.runs.checkpoint import newest_progress
from cluster.runs.lineage import open_attempt
from cluster.runs.logs import log_folder, make_room, write_end
from cluster.runtime.autoscaler import autoscaler
from cluster.runtime.failures import LOST, StageFailed, classify, inner, of_a_peer
from cluster.runtime.nodes import Node, draining_nodes, listens, nodes
from cluster.runtime.placement import Demand, Gang, fit
from cluster.runtime.poller import Poller
from cluster.runtime.postmortem import postmortem
from cluster.telemetry.meter import Snapshot
from cluster.telemetry.monitor import StageMonitor
from cluster.training.job import Job
from cluster.training.requests import Request

POLL = 0.2
"""Seconds between two looks at a group that trains."""

REPORT = 1.0
"""Seconds between two reports of a rank."""

CLUSTER_POLL = 2.0
"""Seconds between two looks at the machines."""

ENDING = 20.0
"""Seconds that Ray Train is given to end the ranks of a stage that has failed."""

NOTICED = 120.0
"""Seconds that Ray Train is given to notice that ranks were killed."""


class Elsewhere(Exception):
    """Ranks that failed are to start on other machines. Who judges failures was told of this one."""


class Group:
    """Ranks on these machines, started as often as it takes.

    Attributes:
        reason: the class of failure for which they were asked to leave.
        why: the same, in words.
        hang: why ranks were killed, if they were.
    """

    reason: str
    why: str
    _elsewhere: bool

    def __init__(
        self,
        job: Job,
        gang: Gang,
        place: list[str],
        monitor: StageMonitor,
        interruption: Interruption,
        assert_ours: Callable[[], None],
        enough: Callable[[], str],
    ):
        """Start nothing yet.

        Args:
            job: what every rank does; its attempt is opened here, at each start.
            gang: how many ranks there may be, and what each needs.
            place: the machine of each rank.
            monitor: takes the ranks' numbers and what is said.
            interruption: whether the run was told to end.
            assert_ours: raises once another driver has the run.
            enough: says why the ranks are to leave for good, once they are.
        """
        self._enough = enough
        self._job, self._gang, self._place = job, gang, place
        self._monitor, self._interruption, self._assert_ours = monitor, interruption, assert_ours
        self._names = {node.id: f"{node.name} ({node.address})" for node in nodes()}
        self._board = BoardClient.start(monitor.say)
        self._growth: Demand | None = None
        self._grows, self._growing = False, Lock()
        self._reserved, self._price = False, Berths(job.experiment.telemetry.prices)
        self._berths = [self._price.of(node, gang.each(len(place))) for node in place]
        if job.experiment.telemetry.budget and (free := {berth.node for berth in self._berths if berth.price < 0}):
            monitor.say(f"nobody knows what {', '.join(sorted(free))} costs, so telemetry.budget does not count it: set telemetry.prices")
        self._poller = Poller(self._ask_of_machines, CLUSTER_POLL, RayError)
        self._begin()
        if len(hosts := dict.fromkeys(place)) > 1:
            ranks = {host: [rank for rank, node in enumerate(place) if node == host] for host in hosts}
            monitor.say("ranks: " + ", ".join(f"{self._names.get(host, host)} {_span(of)}" for host, of in ranks.items()))
        elif len(place) < gang.most:
            monitor.say(f"{len(place)} of at most {gang.most} ranks; more start at a checkpoint when there is room for them")

    def train(self, notes: str, judge: Callable[[Exception, "Group"], None]) -> dict[str, Any]:
        """Bring the ranks to their end, or to the checkpoint at which they leave.

        Where their machines are all still there after a failure, they are started again on the same ones, unless the gang avoids one of
        them now and has room without it.

        Args:
            notes: folder of this machine for Ray Train's own notes.
            judge: told of such a failure; raises if the ranks are not to be started again.

        Raises:
            Elsewhere: after a failure that `judge` was told of, if places have to be found anew.
            TrainingFailedError, RayError: a failure after which places have to be found anew; `judge` was not told.
        """
        fit_thread = Fit(self._job, self._gang, self._place, self._board.actor, notes)
        fit_thread.start()
        try:
            while fit_thread.is_alive():
                fit_thread.join(POLL)
                if error := self._look():
                    self._decide(error, judge)
        except StageFailed:
            fit_thread.join(ENDING)
            raise
        finally:
            self._book_places()
            self._board.close()
            fit_thread.end()
            self._withdraw_growth()
        if fit_thread.error and self._elsewhere:
            raise Elsewhere from fit_thread.error
        if fit_thread.error:
            raise fit_thread.error
        if fit_thread.value["left"] and not self.reason:  # it was found too late that the room is gone again
            self.reason, self.why = "resized", "there was room for more ranks"
        return fit_thread.value

    def _begin(self) -> None:
        """What is known of the ranks belongs to one attempt."""
        self.reason, self.why = "", ""
        self.hang: Hang | None = None
        self._blamed: Sequence[int] | None = None
        self._elsewhere = False
        self._killed: tuple[float, StageFailed] | None = None
        self._progress, self._heard = 0.0, dict[int, Snapshot]()
        self._watchdog = Watchdog(len(self._place), self._rank_name)
        make_room(self._job.run)
        self._job = replace(self._job, attempt=open_attempt(self._job.run, self._job.life))
        self._board.begin(self._job.attempt, self._assert_ours)
        self._goes_on_from = newest_progress(self._job.run, self._job.stage)
        self._monitor.again(self._goes_on_from)
        self._grows = True

    def _decide(self, error: Exception, judge: Callable[[Exception, "Group"], None]) -> None:
        """Answer Ray Train, which waits: the same ranks again, or the end of this group."""
        again, self._killed = False, None
        try:
            self._withdraw_growth()  # or it would take the places of the ranks
            if isinstance(error, WorkerGroupError) and not self.reason and not self._interruption.signal and self._machines_answer():
                judge(error, self)
                self._elsewhere = self._has_room_elsewhere()
                if not self._elsewhere:
                    self._begin()
                    again = True
        finally:
            self._board.decide(again)

    def _machines_answer(self) -> bool:
        try:
            there = {node.id: node for node in nodes() if not node.draining}
        except RayError:
            return False
        return all(host in there and listens(there[host].address, there[host].port) for host in dict.fromkeys(self._place))

    def _has_room_elsewhere(self) -> bool:
        """Whether ranks are on a machine that gets none any more, and there is room without it."""
        if not self._gang.avoid() & set(self._place):
            return False
        with suppress(RayError):
            return len(fit(self._gang, self._given_back([]))) >= self._gang.least
        return False

    def _withdraw_growth(self) -> None:
        if not self._growing.acquire(timeout=ENDING):
            return  # the cluster does not answer: nothing is placed
        try:
            self._grows = False  # the poller may be on its way
            if self._growth:
                with suppress(RayError):
                    self._growth.remove()
                self._growth = None
                self._monitor.release()
        finally:
            self._growing.release()

    @property
    def attempt(self) -> int:
        """The number of the present start of the ranks."""
        return self._job.attempt

    def where(self, error: BaseException, cause: BaseException) -> str:
        """Rank, host and step of a failure, as far as they are known."""
        rank = _rank_of(error, cause)
        steps = math.ceil(self._progress / self._job.experiment.optim.batch[self._job.stage])
        known = [f"after step {steps} ({self._progress:.0f} items)"] if self._progress else []
        if rank is not None and rank < len(self._place) and not self.hang:  # which says itself whom it means
            peer = "a peer of " * (isinstance(cause, RuntimeError) and " peer" in str(cause))  # gloo: who is told, not who is gone
            known = [f"{peer}rank {rank}", f"host {self._names.get(self._place[rank], self._place[rank])}", *known]
        return ", ".join(known)

    def to_blame(self, error: BaseException, cause: BaseException) -> tuple[str, str]:
        """The one machine that a failure names, by Ray's id and for people; empty where it names none, or several."""
        if self._blamed is not None:
            ranks = self._blamed
        elif of_a_peer(cause):  # who tells it has heard of it: that says nothing of its own machine
            return "", ""
        else:
            ranks = [rank for rank in (_rank_of(error, cause),) if rank is not None]
        hosts = {self._place[rank] for rank in ranks if rank < len(self._place)}
        if len(hosts) != 1:
            return "", ""
        (host,) = hosts
        return host, self._names.get(host, host)

    def _look(self) -> Exception | None:
        """Take the ranks' numbers, look at the machines, and ask what is to be asked; returns a failure that waits for a decision."""
        self._assert_ours()
        if self._killed and time.monotonic() - self._killed[0] > NOTICED:
            self._keep_end(self._killed[1])
            raise self._killed[1]
        if self._interruption.signal and self.reason != "interrupted":
            self.reason = "interrupted"
            self._monitor.say("told to end: a checkpoint at the next step, then the end; the second Ctrl-C ends at once")
        if self.reason in ("", "resized") and (why := self._enough()):
            self.reason, self.why = "enough", why
            self._monitor.say(f"{why}: a checkpoint at the next step, then the end")
        if self.reason in ("", "resized") and (answer := self._poller.answer()):
            self._heed(*answer)
        try:
            taken = self._board.take(self._request())
        except ActorDiedError as gone:
            if not self._killed:
                self._give_up_unheard(gone)
            return None
        if taken is None:
            return None
        snapshots, error = taken
        self._book_places()
        for snapshot in snapshots:
            self._monitor.take(snapshot)
            self._watchdog.hear(snapshot)
            self._heard[snapshot["rank"]] = snapshot
            self._progress = max(self._progress, snapshot["gauges"].get("progress_items", 0))
        if self.hang is None and error is None:
            self._look_for_hang()
        return cloudpickle.loads(error) if error else None

    def _book_places(self) -> None:
        """Tell from when to when the ranks' places are held: Ray Train itself takes seconds to start and to end."""
        if places := self._board.places():
            self._monitor.hold(self._berths, self._goes_on_from, *places)

    def _look_for_hang(self) -> None:
        if said := self._watchdog.slow():
            self._monitor.say(said)
        if (stuck := self._watchdog.look()) is None:
            return
        if not self._heard:  # nobody knows their processes: they end with the driver
            raise self._hung(Hang(f"{stuck.text}; no rank was heard of"))
        folder = log_folder(self._job.life, self._job.attempt)
        self.hang = Hang(f"{stuck.text}; stacks of all ranks are in {self._job.run.url}/{folder}/")
        self._blamed = stuck.ranks
        self._monitor.say(f"{stuck.text}: writing the stacks of all ranks, then killing what hangs")
        self._board.ask(Request.STACKS)
        time.sleep(2 * REPORT)  # each rank reports once a second, and hears it then
        self._examine(folder, sorted(self._heard), kill=False)
        self._kill(folder, [rank for rank in stuck.ranks if rank in self._heard] or sorted(self._heard), self._hung(self.hang))

    def _hung(self, hang: Hang) -> StageFailed:
        failure, _ = classify([hang])
        return StageFailed(self._job.stage, failure, hang)

    def _give_up_unheard(self, error: RayError) -> None:
        """The board's process is gone: ranks train on, but nobody hears them, nor they the driver. They start again, with another board."""
        lost = StageFailed(self._job.stage, LOST, error)
        if not self._heard:  # nobody knows their processes: they end with the driver
            self._keep_end(lost)
            raise lost
        self._blamed = ()
        self._monitor.say(f"{WHO} is gone: killing the ranks, which start again")
        self._kill(log_folder(self._job.life, self._job.attempt), sorted(self._heard), lost)

    def _keep_end(self, why: StageFailed) -> None:
        write_end(self._job.run, self._job.life, self._job.attempt, self._job.stage, str(why))

    def _kill(self, folder: str, ranks: Sequence[int], why: StageFailed) -> None:
        self._examine(folder, ranks, kill=True)
        self._killed = time.monotonic(), why

    def _examine(self, folder: str, ranks: Sequence[int], kill: bool) -> None:
        """Look at ranks from outside, where they could not say themselves where they are; kill them or not."""
        asked = []
        for rank in ranks:
            there = NodeAffinitySchedulingStrategy(self._place[rank], soft=False)
            task = postmortem.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            key = f"{folder}/{self._job.stage}-stacks-{rank}.txt"
            asked.append(task.remote(self._job.run, key, self._heard[rank]["pid"], kill))
        if asked:  # a machine may be out of reach: then Ray will say that it is lost
            ray.wait(asked, num_returns=len(asked), timeout=20)

    def _rank_name(self, rank: int) -> str:
        return f"rank {rank} on {self._names.get(self._place[rank], self._place[rank])}"

    def _request(self) -> Request:
        if self.hang:
            return Request.STACKS
        if not self.reason:
            return Request.NOTHING
        return Request.LEAVE_AT_CHECKPOINT if self.reason == "resized" else Request.LEAVE

    def _heed(self, leaving: list[str], room: int) -> None:
        """Have the ranks leave where a machine of theirs will go, or at a checkpoint as long as there is room for more of them."""
        if leaving:
            self.reason, self.why = "preempted", f"{', '.join(self._names.get(node, node) for node in leaving)} will be taken away"
            self._monitor.say(f"{self.why}: a checkpoint at the next step")
        elif (more := room - len(self._place)) > 0:
            self.reason, self.why = "resized", f"there is room for {more} more ranks"
        else:
            self.reason, self.why = "", ""

    def _ask_of_machines(self) -> tuple[list[str], int]:
        """Which of the ranks' machines are about to go, and how many ranks there would be room for."""
        draining = draining_nodes()
        leaving = [node for node in dict.fromkeys(self._place) if node in draining]
        lacking = self._gang.most - len(self._place)
        if leaving or lacking <= 0 or len(self._heard) < len(self._place):  # until all ranks are placed, what is free is theirs
            return leaving, 0
        # Where no autoscaler sees it nothing is reserved: it would get what another run gives back for the moment in which that one starts
        # with more ranks, keep it idle until the next checkpoint, and then lose it to the other one in the same way.
        asks = self._growth is None and autoscaler() is not None
        with self._growing:
            if not self._grows or len(self._heard) < len(self._place):
                return leaving, 0
            if asks and self._growth is None:
                self._growth, self._reserved = Demand(replace(self._gang, memory=None), lacking), False
            return leaving, self._room()

    def _room(self) -> int:
        """How many ranks there would be room for, if these and what is asked for beside them gave back what they have."""
        grown = (self._growth.place() if self._growth else None) or []
        if grown and not self._reserved:
            self._monitor.reserve([self._price.of(host, self._gang.resources) for host in grown])
            self._reserved = True
        return max(len(self._place), len(fit(self._gang, self._given_back(grown))))

    def _given_back(self, grown: Sequence[str]) -> list[Node]:
        """The machines as if the ranks, and what is reserved for more of them there, had given back what they have."""
        held = [(host, self._gang.each(len(self._place))) for host in self._place]
        held += [(host, dict(self._gang.resources)) for host in grown]
        there = {node.id: node for node in nodes()}
        for host, amounts in held:
            if host in there:
                free = {name: there[host].free.get(name, 0.0) + amount for name, amount in amounts.items()}
                there[host] = replace(there[host], free={**there[host].free, **free})
        return list(there.values())


def _rank_of(error: BaseException, cause: BaseException) -> int | None:
    """Which rank showed the cause of a failure, as far as that is known."""
    failures = getattr(error, "worker_failures", {})
    return next((rank for rank, one in failures.items() if inner(one) is cause), next(iter(failures), None))


def _span(ranks: list[int]) -> str:
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
