"""What jobs share on the command line: one paragraph for an error, exit codes, and the arguments of studies."""

import argparse
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from cluster.config.schema import Run
from cluster.runtime.failures import AGAIN, StageFailed, exit_code, failure_of, paragraph

INTERRUPTED = 130
TERMINATED = 143


def run(main: Callable[[], int]) -> int:
    """Run a job's main; an error that is not one of the program becomes one paragraph on stderr, and an exit code.

    0: what was asked for is done. 75: the same command may go on by itself. 1: a person must act. 130, 143: it was told to end.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return INTERRUPTED
    except ConnectionError as error:  # a cluster that does not answer, and may
        print(f"error: {error}", file=sys.stderr)
        return AGAIN
    except Exception as error:
        failure = failure_of(error)
        if not isinstance(error, ValueError | StageFailed) and (failure is None or failure.name == "user"):
            raise  # a mistake of the program: the traceback says where
        print(f"error: {paragraph(error)}", file=sys.stderr)
        return exit_code(error)


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a command in order, as Ctrl-C does."""
    sys.exit(TERMINATED)


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse wants it.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number of at least 1")
    return int(text)


def add_run(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """Give a parser the argument RUN, and the option that says where a mere name is looked up."""
    parser.add_argument("run", nargs="?" if optional else None, metavar="RUN", help="name of a run, or its folder or URL (.../runs/NAME)")
    add_store(parser)


def add_store(parser: argparse.ArgumentParser) -> None:
    """Give a parser the option that says where a run's mere name is looked up."""
    parser.add_argument("--store", default=Run().store, metavar="URL", help="where a run's mere name is looked up (default: %(default)s)")


def study_parser(description: str, what: str, config: Path) -> argparse.ArgumentParser:
    """The parser of a job over many runs: `--config FILE` and KEY=VALUE.

    Args:
        description: of the job.
        what: its file describes, for example "sweep".
        config: the file that is taken without `--config`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=config, help=f"YAML file of the {what} (default: jobs/configs/{config.name})")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change one key of the experiment, for example optim.epochs=2")
    return parser
