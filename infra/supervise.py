"""Give a command again for as long as its exit code says that the same command may go on.

  python infra/supervise.py -- python jobs/train.py --config jobs/configs/demo.yaml

The rule is that of the README ("Resume, and what the exit codes say"): 75 and everything above 128, a kill by a signal included, is
repeated, however often; 0, 1 and 2 have nothing to gain from it; 130 and 143 were told to end. The pause before a repeat begins at 10 s
and doubles up to 5 minutes; a command that ran for an hour begins anew. Every repeat is one line on stderr.

SIGTERM, SIGINT and SIGHUP are handed to the command once, and nothing is repeated after them. The command lives in a process group of its
own, so that Ctrl-C in a terminal reaches it through here and not a second time; if this process dies, the command gets SIGTERM.
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: the same command may go on."""

TOLD_TO_END = (130, 143)
"""128 + SIGINT, 128 + SIGTERM."""

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 300.0
"""Seconds."""

LONG_RUN = 3600.0
"""Seconds after which a command is no longer one that fails at once."""

PASSED_ON = {one for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN}
"""What ends the command; under `nohup`, say, SIGHUP does not."""

WATCHED = PASSED_ON | {signal.SIGCHLD}
PR_SET_PDEATHSIG = 1


def repeated(code: int) -> bool:
    """Whether the command that ended with this exit code is given again."""
    return code == AGAIN or (code > 128 and code not in TOLD_TO_END)


def pause(seconds: float) -> int:
    """Wait; the number of a signal that told this process to end meanwhile, or 0."""
    received = signal.sigtimedwait(PASSED_ON, seconds)
    return received.si_signo if received else 0


def supervise(command: Sequence[str], pause: Callable[[float], int] = pause, clock: Callable[[], float] = time.monotonic) -> int:
    """Run the command until its exit code is not one that is repeated; the signals of WATCHED must be blocked in this thread.

    Args:
        command: program and arguments.
        pause: waits for so many seconds; gives the number of a signal that told this process to end, or 0.
        clock: seconds.

    Returns:
        The last exit code; 128 + the signal's number, if a signal ended what would otherwise have been repeated.
    """
    seconds = FIRST_PAUSE
    while True:
        began = clock()
        code, told = _run(command)
        if not repeated(code):
            return code
        if told:
            return 128 + told
        if clock() - began >= LONG_RUN:
            seconds = FIRST_PAUSE
        print(f"supervise: exit code {code}, so the same command again in {seconds:g} s", file=sys.stderr, flush=True)
        if told := pause(seconds):
            return 128 + told
        seconds = min(2 * seconds, LONGEST_PAUSE)


def _run(command: Sequence[str]) -> tuple[int, int]:
    """The exit code of the command, as a shell gives it, and the number of the last signal that was handed to it, or 0."""
    parent = os.getpid()

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the line above
            os._exit(128 + signal.SIGTERM)

    child = subprocess.Popen(command, process_group=0, preexec_fn=prepare)
    told = 0
    while child.poll() is None:
        number = signal.sigwait(WATCHED)
        if number in PASSED_ON:
            told = number
            child.send_signal(number)
    return (child.returncode if child.returncode >= 0 else 128 - child.returncode), told


def main() -> int:
    """Parse the command line and supervise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="program and arguments, after --")
    command = parser.parse_args().command
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, children leave no exit code
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    try:
        return supervise(command)
    except OSError as error:  # no such program: again would not help
        print(f"supervise: {command[0]}: {error.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
