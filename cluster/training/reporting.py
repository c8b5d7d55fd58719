"""A rank tells where it is once a second, from a thread of its own, and hears what is asked of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.telemetry.meter import Meter, Snapshot
from cluster.telemetry.repeating import repeating
from cluster.training.requests import Request
from cluster.training.stacks import in_collective


@dataclass
class Inbox:
    """The latest request of the driver to this rank; another thread puts it there."""

    request: Request = Request.NOTHING


@contextmanager
def reporting(
    meter: Meter,
    report: Callable[[Snapshot], Request | None],
    write_stacks: Callable[[], None],
    device_gauges: Callable[[], dict[str, float]] = dict,
) -> Iterator[Inbox]:
    """Hand over a snapshot about once a second and at the end, with what the device says of itself; what is asked for comes back."""
    inbox = Inbox()

    def tell() -> None:
        meter.gauges.update(device_gauges())
        snapshot = meter.snapshot()
        snapshot["collective"] = in_collective()
        before, inbox.request = inbox.request, report(snapshot) or Request.NOTHING
        if inbox.request == Request.STACKS != before:
            write_stacks()

    try:
        with repeating(tell, 1.0, "report"):
            yield inbox
    finally:
        report(meter.snapshot())
