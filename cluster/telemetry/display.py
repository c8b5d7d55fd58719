"""What a person watching a job sees: a progress bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

QUIET = 10.0
"""Seconds between two progress lines where there is no terminal."""


class Display:
    """Progress of one piece of work after the other; a context manager, so that the terminal is left as it was found.

    On a terminal a bar stays at the bottom; elsewhere (job logs, CI) a plain line comes at most every `QUIET` seconds. Both get
    a line when a stage begins and ends.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._stream = stream or sys.stdout
        self._clock = clock
        self._bar: Progress | None = None
        if self._stream.isatty():
            console = Console(file=self._stream, markup=False, highlight=False, emoji=False)
            columns = (TextColumn("{task.description}", markup=False), BarColumn(None), TextColumn("{task.fields[state]}", markup=False))
            self._bar = Progress(*columns, console=console, transient=True, expand=True)
        self._name = ""
        self._total, self._unsaid, self._said = 0, "", 0.0

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()
        if self._bar:
            self._bar.stop()

    def stage(self, name: str, total: int, start: int = 0) -> None:
        """Begin a stage of `total` items, or go on with it, at progress `start`."""
        self._begin(name, total, "items", start)

    def update(self, progress: int, loss: float, items_per_second: float, data_wait_share: float) -> None:
        """Show where the stage is.

        Args:
            progress: items trained so far.
            loss: loss of the latest step.
            items_per_second: present speed over all ranks.
            data_wait_share: share of the ranks' time, in [0, 1], spent waiting for data.
        """
        left = timedelta(seconds=round((self._total - progress) / items_per_second)) if items_per_second > 0 else "unknown time"
        speed = f"{items_per_second:.4g} items/s, data wait {data_wait_share:.0%}, {left} left"
        self._show(progress, f"{progress / self._total:.0%}, loss {loss:.4g}, {speed}")

    def counter(self, name: str, what: str) -> Callable[[int, int], None]:
        """Begin something that counts up; call what is returned with (done, in all), the latter the same each time."""
        begun = False

        def tick(done: int, total: int) -> None:
            nonlocal begun
            if not begun:
                self._begin(name, total, what)
                begun = True
            self._show(done, f"{done / total:.0%}")

        return tick

    def end(self, text: str) -> None:
        """End what is shown, and say what came of it."""
        self._end()
        self.say(text)

    def say(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._bar:
            self._bar.console.print(text, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def _begin(self, name: str, total: int, what: str, start: int = 0) -> None:
        self._end()
        self._name, self._total, self._what, self._said = name, total, what, self._clock()
        if self._bar:
            self._bar.add_task(name, total=total, completed=start, state="")
        self.say(f"{name}: {_number(total)} {what}" + (f", going on at {_number(start)}" if start else ""))

    def _show(self, done: int, state: str) -> None:
        self._unsaid = f"{self._name}: {_number(done)} of {_number(self._total)} {self._what}, {state}"
        if self._bar:
            self._bar.update(self._bar.task_ids[-1], completed=done, state=state)
        elif self._clock() - self._said >= QUIET:
            self._say_state()

    def _say_state(self) -> None:
        self.say(self._unsaid)
        self._unsaid, self._said = "", self._clock()

    def _end(self) -> None:
        if self._unsaid:
            self._say_state()
        if self._bar:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)


def _number(count: int) -> str:
    return f"{count:,}".replace(",", " ")
