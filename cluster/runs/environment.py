"""What a life ran on and with; kept with its number."""

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import distributions
from typing import Any

from cluster.config.identity import placement
from cluster.config.schema import Experiment

ARITHMETIC = 3
"""Version of how a step is computed: with another one the same step has other last bits. Lives that name none had 1."""

CREDENTIALS = re.compile(r"(?<=://)([^\s,'\"/?#]*|[^\s,'\"/?#:]+:[^\s,'\"]*)@")
"""What a URL has before its host: a name, a password. A password may hold a '/' that should have been quoted."""

QUERY = re.compile(r"(?<=://)([^\s,'\"?]*\?)[^\s,'\"]+")
"""A URL up to its query, and the query: signed URLs have their signature there."""


NAMED = re.compile(r"(?i)^(-[\w-]*(?:password|secret|token)[\w-]*=).+")
"""An option whose name says that its value is a secret; a process that Ray started has such."""


def command() -> str:
    """The command line of this process, as it can be pasted, without secrets."""
    return shlex.join(map(without_secrets, sys.argv))


def without_secrets(text: str) -> str:
    """A word of a command line without the credentials and queries of its URLs."""
    return NAMED.sub(r"\1***", QUERY.sub(r"\1***", CREDENTIALS.sub("***@", text)))


def environment(experiment: Experiment) -> dict[str, Any]:
    """Host, command, git revision, packages and placement of this process; no secret of a URL is in it."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "pid": os.getpid(),
        "command": [without_secrets(word) for word in sys.argv],
        "python": platform.python_version(),
        "git": _revision(),
        "arithmetic": ARITHMETIC,
        "packages": {d.name: d.version for d in distributions()},
        "placement": placement(experiment),
    }


def _revision() -> str:
    """The git revision of the code; empty where there is none, or no git."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
