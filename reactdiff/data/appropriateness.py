"""Which real reactions are appropriate for which speaker: a split's matrix, read or cut out of the official one."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reactdiff.data.paths import recording_of

INDICES = "data_indices.csv"
MATRIX = "Approprirate_facial_reaction.npy"  # the official spelling


def appropriateness(root: Path, split: str, speakers: Sequence[str]) -> np.ndarray | None:
    """The (2n, 2n) bool matrix of a split whose n pairs have these speaker paths: all pairs plain, then all mirrored.

    `neighbour_emotion_<split>.npy` where it exists, else cut from the official matrix; None where there is neither.

    Raises:
        ValueError: if a matrix has the wrong shape or other values than 0 and 1, a clip is not (or twice) in the index, or a
            row has no appropriate reaction; names the file or clip.
    """
    ready, whole = root / f"neighbour_emotion_{split}.npy", root / MATRIX
    if ready.exists():
        matrix = _binary(np.load(ready, allow_pickle=False), ready.name)
        if matrix.shape != (2 * len(speakers),) * 2:
            raise ValueError(
                f"{ready} has shape {matrix.shape}, but {split}.csv has {len(speakers)} pairs and the matrix must be square with "
                f"side {2 * len(speakers)}; remove it and it is cut from {MATRIX}"
            )
    elif whole.exists():
        matrix = _cut(root, speakers)
    else:
        return None
    empty = np.flatnonzero(~matrix.any(axis=1))
    if empty.size:
        direction, pair = divmod(int(empty[0]), len(speakers))
        raise ValueError(
            f"split {split}: clip {speakers[pair]} ({'mirrored' if direction else 'plain'}, row {empty[0]} of its matrix) has no "
            f"appropriate reaction; every row needs at least one 1 ({empty.size} rows have none)"
        )
    return matrix


def _cut(root: Path, speakers: Sequence[str]) -> np.ndarray:
    matrix = np.load(root / MATRIX, mmap_mode="r", allow_pickle=False)
    rows_of = _rows_of(root / INDICES)
    side = 2 * sum(len(rows) for rows in rows_of.values())
    if matrix.shape != (side, side):
        raise ValueError(f"{root / MATRIX} has shape {matrix.shape}; {INDICES} asks for ({side}, {side}), twice its rows")
    plain = [_row(rows_of, speaker) for speaker in speakers]
    taken = np.array(plain + [row + side // 2 for row in plain])
    return _binary(matrix[taken][:, taken], MATRIX)


def _rows_of(file: Path) -> dict[tuple[str, str, str], list[int]]:
    if not file.exists():
        raise ValueError(f"{file} is missing; without it {MATRIX} cannot be cut into splits")
    rows_of: dict[tuple[str, str, str], list[int]] = {}
    with file.open(newline="", encoding="utf-8-sig") as stream:
        for number, row in enumerate(list(csv.reader(stream))[1:]):
            if len(row) != 3:
                raise ValueError(f"{file}, row {number}: {row} should be site, chat_index, clip_index")
            site, chat, clip = (cell.strip() for cell in row)
            rows_of.setdefault((site.upper(), chat, clip), []).append(number)
    return rows_of


def _row(rows_of: dict[tuple[str, str, str], list[int]], speaker: str) -> int:
    rows = rows_of.get(recording_of(speaker), [])
    if len(rows) != 1:
        found = f"in rows {rows}" if rows else "nowhere"
        raise ValueError(f"clip {speaker} must be in {INDICES} once, as {','.join(recording_of(speaker))}; it is {found}")
    return rows[0]


def _binary(matrix: np.ndarray, name: str) -> np.ndarray:
    if not np.isin(matrix, (0, 1)).all():
        raise ValueError(f"{name} must hold 0 and 1 only")
    return matrix.astype(bool)
