"""Where every thread of this process is, for somebody who wants to know why it does not go on."""

import faulthandler
import os
import sys
import tempfile

COLLECTIVES = f"{os.sep}torch{os.sep}distributed{os.sep}"
"""Part of the name of each file whose functions wait for other ranks."""


def stacks() -> str:
    """The stack of each Python thread, the innermost call first."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def in_collective() -> bool:
    """Whether a thread of this process is in a collective, where it waits for other ranks."""
    return any(COLLECTIVES in frame.f_code.co_filename for frame in sys._current_frames().values())
