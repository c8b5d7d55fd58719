"""On the PYTHONPATH of a command, makes its machine one where only what `jobs/bench.py gpu` needs is installed."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

LACKING = {"ray", "boto3", "botocore", "webdataset", "prometheus_client", "fastcrc", "numba", "soundfile", "matplotlib", "tensorboard"}


class Lacking(MetaPathFinder):
    """Finds none of these packages."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] in LACKING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


sys.meta_path.insert(0, Lacking())
