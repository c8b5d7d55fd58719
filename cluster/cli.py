"""What every job shares: one sentence for an error, the exit code, and numbers on the command line."""

import argparse
import sys
from collections.abc import Callable

from cluster.runs.state import Superseded
from cluster.runtime.failures import StageFailed
from cluster.storage import StorageError

INTERRUPTED = 130


def run(main: Callable[[], int]) -> int:
    """Run a job's main; an error that a person can mend becomes one paragraph on stderr and a non-zero exit code."""
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, StorageError, StageFailed, Superseded, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse wants it.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number of at least 1")
    return int(text)
