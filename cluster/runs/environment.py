"""What a life ran on and with; kept with its number."""

import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import distributions
from typing import Any

from cluster.config.identity import placement
from cluster.config.schema import Experiment


def environment(experiment: Experiment) -> dict[str, Any]:
    """Host, command, git revision, packages and placement of this process; no secret is in it."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "pid": os.getpid(),
        "command": sys.argv,
        "python": platform.python_version(),
        "git": git.stdout.strip(),
        "packages": {d.name: d.version for d in distributions()},
        "placement": placement(experiment),
    }
