"""What a clip path of the official tree says: whose clip it is, and where each kind of file keeps it.

A path is `<site>/<chat>/<person>/<clip>`, or UDIVA's `<site>/<task>/<id>/<person>/<clip>`.
"""

import csv
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "val", "gate", "test")
"""The official splits, and `gate`: like `test`, held back for promotions. Each exists where its CSV does."""

EMOTION_NAMES = {
    "NoXI": {"Expert_video": "P1", "Novice_video": "P2"},
    "RECOLA": {"P25": "P1", "P41": "P1", "P45": "P1", "P26": "P2", "P42": "P2", "P46": "P2"},
}
"""How `Emotion/` names the persons of a site; UDIVA's keep their names."""

PATH = re.compile(r"(?!.*(^|/)\.\.?(/|$))[^/\\]+(/[^/\\]+){3,4}")
LONGEST_KEY = 80


@dataclass(frozen=True)
class Pair:
    """One row of a split's CSV: person `a` is the speaker of that row, `b` the listener."""

    key: str
    split: str
    row: int
    speaker_path: str
    listener_path: str


def key_of(path: str) -> str:
    """A clip's key: its speaker path with `__` for `/` and `-` for what a key may not hold; over 80 characters it ends in a hash."""
    slug = re.sub(r"[^A-Za-z0-9_-]", "-", path.replace("/", "__"))
    digest = hashlib.blake2b(path.encode(), digest_size=8).hexdigest()
    return slug if len(slug) <= LONGEST_KEY else f"{slug[: LONGEST_KEY - 17]}-{digest}"


def subject_of(path: str) -> str:
    """Who is seen in a clip, as far as its path tells: `<site>/<chat>/<person>`, whatever the task."""
    site, *_, chat, person, _ = path.split("/")
    return f"{site}/{chat}/{person}"


def recording_of(path: str) -> tuple[str, str, str]:
    """The (SITE, chat, clip) by which `data_indices.csv` knows a clip; UDIVA's chat is `<id>_<task>`."""
    site, *chat, _, clip = path.split("/")
    return site.upper(), "_".join(reversed(chat)), clip


def emotion_of(path: str) -> str:
    """The path under which `Emotion/` keeps a clip: NoXI's and RECOLA's persons are P1 and P2 there."""
    *before, person, clip = path.split("/")
    return "/".join([*before, EMOTION_NAMES.get(before[0], {}).get(person, person), clip])


def read_pairs(file: Path, split: str) -> Iterator[Pair]:
    """The pairs of a split's CSV, in file order.

    Raises:
        ValueError: naming file and row, if a row is not a number and two clip paths.
    """
    with file.open(newline="", encoding="utf-8-sig") as stream:
        lines = [line for line in csv.reader(stream) if line]
    for row, line in enumerate(lines[1:]):
        paths = [cell.strip() for cell in line[1:]]
        if len(paths) != 2 or not all(PATH.fullmatch(path) for path in paths):
            example = "0,NoXI/065_2016-04-14_Nottingham/Expert_video/1,NoXI/065_2016-04-14_Nottingham/Novice_video/1"
            raise ValueError(f"{file}, row {row}: {','.join(line)!r} should be a number and two clip paths, like {example}")
        yield Pair(key_of(paths[0]), split, row, *paths)


def refuse_collisions(pairs: list[Pair]) -> None:
    """Make sure every pair has a key of its own.

    Raises:
        ValueError: naming both rows, if two pairs share one.
    """
    seen: dict[str, Pair] = {}
    for pair in pairs:
        other = seen.setdefault(pair.key, pair)
        if other is not pair:
            raise ValueError(
                f"{other.split}.csv row {other.row} ({other.speaker_path}) and {pair.split}.csv row {pair.row} ({pair.speaker_path}) "
                f"have the same key {pair.key}; a clip may be in the dataset once"
            )
