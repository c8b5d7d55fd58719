"""Temporary folders are gone when their process is, and never before."""

import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.runtime.scratch import PREFIX, remove_abandoned, scratch_folder

HOLDER = """
from pathlib import Path
from cluster.runtime.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "shard.tar").write_bytes(bytes(1000))
    print(folder, flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made, in children of this process, too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.starts
def test_a_folder_lives_as_long_as_its_process_and_the_next_one_removes_it(root: Path) -> None:
    others = [root / "somebody's", root / f"reactdiff-{platform.node()}-runs", root / f"{PREFIX}2-abcdefgh"]  # the last of node a-2, say
    for other in others:
        other.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        left = Path(holder.stdout.readline().strip())
        with scratch_folder() as folder:
            assert folder != left and (left / "shard.tar").stat().st_size == 1000
        assert not folder.exists() and left.exists()
        holder.kill()
    assert left.exists()
    with scratch_folder() as folder:
        assert sorted(root.iterdir()) == sorted([folder, *others])
    assert sorted(root.iterdir()) == sorted(others)


def test_a_folder_swept_before_it_was_locked_is_made_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = tempfile.mkdtemp

    def make_and_sweep(prefix: str) -> str:
        made.append(make(prefix=prefix))
        if len(made) == 1:
            remove_abandoned(root)
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_sweep)
    with scratch_folder() as folder:
        assert [str(folder)] == made[1:] and not Path(made[0]).exists()


def test_no_folder_is_taken_from_its_owner_by_those_who_come_and_go_beside_it(root: Path) -> None:
    def use(number: int) -> bool:
        with scratch_folder() as folder:
            (folder / "one").write_bytes(b"1")
            (folder / "two").write_bytes(b"2")
            return sorted(path.name for path in folder.iterdir()) == ["one", "two"]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(200)))
    assert not list(root.glob(f"{PREFIX}*"))
