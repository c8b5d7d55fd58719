"""What this process holds."""

import re
from pathlib import Path


def kilobytes(what: str) -> int:
    """A line of /proc/self/status, such as VmRSS (now) or VmHWM (at most so far). `ru_maxrss` would begin with the parent's."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
