"""Who gives the same command again: real commands under the real rule, with pauses and clock of the test's own."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from infra import supervise as module
from infra.supervise import FIRST_PAUSE, LONG_RUN, LONGEST_PAUSE, WATCHED, repeated, supervise
from tests.tiny import ROOT

HANDLER = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit({code})); print('ready', flush=True); signal.pause()"
"""A command that says when it is ready, and what it ends with when it is told to."""


@pytest.fixture
def blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.fixture
def codes(tmp_path: Path) -> Callable[..., list[str]]:
    """A command that takes its exit codes, one a start, from a file; a negative one is a signal it sends to itself."""

    def command(*wanted: int) -> list[str]:
        (tmp_path / "codes").write_text("\n".join(map(str, wanted)))
        program = "set -- $(cat codes); code=$1; shift; echo $* > codes; [ $code -ge 0 ] && exit $code; kill $code $$; sleep 60"
        return ["sh", "-c", f"cd {tmp_path}; {program}"]

    return command


class Pauses(list[float]):
    """The pauses that were asked for; the clock stands still but for what each run is said to take."""

    def __init__(self, *, told_after: int = 0, runs: tuple[float, ...] = ()):
        super().__init__()
        self.told_after, self.runs, self.now, self.began = told_after, iter(runs), 0.0, True

    def pause(self, seconds: float) -> int:
        self.append(seconds)
        return signal.SIGTERM if len(self) == self.told_after else 0

    def clock(self) -> float:
        self.began = not self.began
        if self.began:
            self.now += next(self.runs, 0.0)
        return self.now


def test_the_rule_is_the_one_of_the_readme() -> None:
    assert [code for code in range(256) if repeated(code)] == [75, 129, *range(131, 143), *range(144, 256)]
    page = (ROOT / "README.md").read_text().partition("## Resume")[2].partition("\n## ")[0]
    assert all(f"| {code} |" in page for code in (0, 1, 2, 75, 130, 143))


@pytest.mark.starts
@pytest.mark.usefixtures("blocked")
@pytest.mark.parametrize("last", [0, 1, 2, 130, 143])
def test_a_command_is_given_again_on_75_and_on_a_kill_and_its_last_code_comes_through(
    codes: Callable[..., list[str]], last: int, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses = Pauses()
    assert supervise(codes(75, -signal.SIGKILL, 137, 75, last), pauses.pause, pauses.clock) == last
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in said] == [f"supervise: exit code {code}" for code in (75, 137, 137, 75)]


@pytest.mark.starts
@pytest.mark.usefixtures("blocked")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_somebody_else_told_to_end_is_not_given_again(codes: Callable[..., list[str]], number: int, code: int) -> None:
    pauses = Pauses()
    assert supervise(codes(-number), pauses.pause, pauses.clock) == code
    assert pauses == []


@pytest.mark.starts
@pytest.mark.usefixtures("blocked")
def test_pauses_double_up_to_five_minutes_and_begin_anew_after_an_hour_of_running(codes: Callable[..., list[str]]) -> None:
    pauses = Pauses(runs=(*[1.0] * 8, LONG_RUN, LONG_RUN - 1, 1.0))
    assert supervise(codes(*[75] * 10, 0), pauses.pause, pauses.clock) == 0
    assert pauses == [10, 20, 40, 80, 160, 300, 300, 300, 10, 20]
    assert (FIRST_PAUSE, LONGEST_PAUSE) == (10, 300)


@pytest.mark.starts
@pytest.mark.usefixtures("blocked")
def test_who_is_told_to_end_in_a_pause_starts_nothing_any_more(codes: Callable[..., list[str]], tmp_path: Path) -> None:
    pauses = Pauses(told_after=2)
    assert supervise(codes(75, 75, 0), pauses.pause, pauses.clock) == 143
    assert (tmp_path / "codes").read_text() == "0\n"


@pytest.mark.starts
@pytest.mark.usefixtures("blocked")
def test_a_pause_ends_at_once_with_the_signal_that_came() -> None:
    signal.raise_signal(signal.SIGINT)  # of this thread alone: others do not block it
    assert module.pause(600) == signal.SIGINT
    assert module.pause(0) == 0


def start(code: int) -> subprocess.Popen[str]:
    """The program with a command that, told to end, ends with this code; it is ready."""
    line = [sys.executable, ROOT / "infra/supervise.py", "--", sys.executable, "-c", HANDLER.format(code=code)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.starts
@pytest.mark.parametrize(
    ("code", "ends"),
    [(143, 143), (0, 0), (1, 1), pytest.param(75, 143, id="75, which is repeated"), pytest.param(137, 143, id="137, which is repeated")],
)
def test_a_sigterm_to_the_program_ends_the_command_and_nothing_is_repeated(code: int, ends: int) -> None:
    process = start(code)
    process.send_signal(signal.SIGTERM)
    assert (process.communicate(), process.returncode) == (("", ""), ends)


@pytest.mark.starts
def test_a_sigint_to_the_group_of_a_terminal_reaches_the_command_once() -> None:
    """Two are an order to stop without a checkpoint; a terminal sends one to every process of the group in front."""
    counter = "import signal, time; got = []; signal.signal(signal.SIGINT, lambda *_: got.append(1)); print('ready', flush=True)"
    counter += "\nwhile not got: time.sleep(0.01)\ntime.sleep(1); print(len(got)); raise SystemExit(130)"
    line = [sys.executable, ROOT / "infra/supervise.py", "--", sys.executable, "-c", counter]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, process_group=0)
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert (process.communicate()[0], process.returncode) == ("1\n", 130)


@pytest.mark.starts
def test_a_command_does_not_outlive_a_killed_program() -> None:
    process = start(143)
    (command,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    assert command.wait(60) is None and not command.is_running()


@pytest.mark.starts
def test_a_program_that_is_not_there_is_said_and_not_repeated() -> None:
    line = [sys.executable, str(ROOT / "infra/supervise.py"), "--", "no-such-program", "x"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "supervise: no-such-program: No such file or directory\n")
