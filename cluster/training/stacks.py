"""Where every thread of this process is, for somebody who wants to know why it does not go on."""

import faulthandler
import tempfile


def stacks() -> str:
    """The stack of each Python thread, the innermost call first."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
