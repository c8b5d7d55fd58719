"""What is compiled once on a machine, counted by numba in processes that come at the same time."""

import ast
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core.caching import IndexDataCacheFile

from reactdiff.metrics.compiled import compiling, kernel

ROOT = Path(__file__).parents[3]

COMPILED = re.compile(r"kernel\(|numba.njit\(")

SOURCE = """
from reactdiff.metrics.compiled import compiling, kernel

@kernel(error_model="numpy")
def times(x):
    return {factor} * x

with compiling():
    product = times(21.0)
print(product, sum(times.stats.cache_misses.values()), sum(times.stats.cache_hits.values()))
"""


def answers(folder: Path, cache: Path | str, factor: int, processes: int = 1) -> list[str]:
    """What so many processes say that run the module at the same time: the product, and how often they compiled and loaded."""
    (folder / "module.py").write_text(SOURCE.format(factor=factor))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, str(folder / "module.py")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(processes)]
    said = [process.communicate()[0].strip() for process in started]
    assert [process.returncode for process in started] == [0] * processes
    return sorted(said)


@pytest.mark.starts
def test_of_processes_that_come_at_once_one_compiles_and_a_changed_source_is_compiled_anew(tmp_path: Path) -> None:
    assert answers(tmp_path, tmp_path / "cache", 2, processes=2) == ["42.0 0 1", "42.0 1 0"]
    code = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("module.times-*.nbc")}
    assert len(code) == 1
    assert answers(tmp_path, tmp_path / "cache", 3) == ["63.0 1 0"]
    assert {path: path.read_bytes() for path in code} == code, "an index of one source never names the code of another"


def test_a_full_disk_ends_no_scoring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried = []

    def full(*_: object) -> None:
        tried.append(True)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(IndexDataCacheFile, "save", full)

    @kernel()
    def thrice(x: float) -> float:
        return 3 * x

    with compiling():
        assert thrice(14.0) == 42
    assert tried, "it was to be kept"


def test_without_a_folder_that_can_be_written_each_process_compiles_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")

    @kernel()
    def twice(x: float) -> float:
        return 2 * x

    with compiling():
        assert twice(21.0) == 42
    assert twice.stats.cache_path is None


def test_compiled_functions_call_only_what_is_in_their_file() -> None:
    """Their code is kept by the content of that file."""
    found: list[str] = []
    for path in (ROOT / "reactdiff/metrics").glob("*.py"):
        tree = ast.parse(path.read_text())
        ours = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reactdiff")
            for alias in node.names
        }
        for node in ast.walk(tree):
            compiled = isinstance(node, ast.FunctionDef) and any(map(COMPILED.match, map(ast.unparse, node.decorator_list)))
            if isinstance(node, ast.FunctionDef) and compiled:
                found.append(node.name)
                used = {name.id for line in node.body for name in ast.walk(line) if isinstance(name, ast.Name)}
                assert used & ours == set(), f"{path.name}: {node.name}"
    assert {"cost", "_frame_distances", "_laid_out", "_correlations"} < set(found)
