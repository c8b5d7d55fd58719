"""Ranged reads of exactly the members that are wanted: neighbours are joined, and arrays land where they are needed."""

import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

from crc32c import crc32c

GAP = 64 << 10
"""Unwanted bytes between two members that are read along: another request costs more."""

JOINED = 4 << 20
"""Bytes of a read beyond which no further clip joins it: then several readers side by side are faster."""

DIRECT = 256 << 10
"""Bytes of an array from which on it is received in its place; smaller ones come many at a time and are copied there."""

_buffers = threading.local()


class Target(NamedTuple):
    """The bytes an array goes to, and whose they are."""

    bytes: memoryview
    owner: Any = None


class Piece(NamedTuple):
    """One member: its clip's row in the shard, its number in the manifest, where it lies in the tar, and where its array goes."""

    row: int
    member: int
    offset: int
    size: int
    crc: int
    targets: list[Target]

    @property
    def header(self) -> int:
        """Bytes of the .npy file before the array."""
        return self.size - len(self.targets[0].bytes)


class Range(NamedTuple):
    """One ranged read of a shard: its pieces in the order of their offsets."""

    shard: int
    pieces: list[Piece]

    @property
    def start(self) -> int:
        """Where it begins in the tar."""
        return self.pieces[0].offset

    @property
    def length(self) -> int:
        """Its bytes."""
        last = self.pieces[-1]
        return last.offset + last.size - self.start


class Landed(NamedTuple):
    """A piece after its range was read: its header, and its CRC32C as it came."""

    piece: Piece
    header: memoryview
    crc: int


def joined(shard: int, pieces: Iterable[Piece]) -> list[Range]:
    """Pieces of one shard, in the order of their offsets, as few ranges; one clip's members share theirs, however large."""
    ranges: list[Range] = []
    for piece in pieces:
        if ranges:
            here = ranges[-1]
            last = here.pieces[-1]
            near = piece.offset - last.offset - last.size <= GAP
            if near and (piece.row == last.row or piece.offset + piece.size - here.start <= JOINED):
                here.pieces.append(piece)
                continue
        ranges.append(Range(shard, [piece]))
    return ranges


class Layout:
    """Where the bytes of one range are received: large arrays in their place, all else in a buffer of this thread."""

    def __init__(self, part: Range):
        self.part = part
        direct = sum(len(piece.targets[0].bytes) for piece in part.pieces if _direct(piece))
        scratch = _scratch(part.length - direct)
        self.buffers: list[memoryview] = []
        self._at: list[int] = []
        run = used = 0
        position = part.start
        for piece in part.pieces:
            used += piece.offset - position
            self._at.append(used)
            if _direct(piece):
                used += piece.header
                self.buffers += [scratch[run:used], piece.targets[0].bytes]
                run = used
            else:
                used += piece.size
            position = piece.offset + piece.size
        if used > run:
            self.buffers.append(scratch[run:used])
        self._scratch = scratch

    def landed(self) -> list[Landed]:
        """The pieces and their checksums; call it when the buffers are full."""
        found = []
        for piece, at in zip(self.part.pieces, self._at, strict=True):
            header = self._scratch[at : at + piece.header]
            if _direct(piece):
                crc = crc32c(piece.targets[0].bytes, crc32c(header))
            else:
                crc = crc32c(self._scratch[at : at + piece.size])
            found.append(Landed(piece, header, crc))
        return found

    def deliver(self) -> None:
        """Copy arrays to the targets that they were not received in."""
        for piece, at in zip(self.part.pieces, self._at, strict=True):
            direct = _direct(piece)
            array = piece.targets[0].bytes if direct else self._scratch[at + piece.header : at + piece.size]
            for target in piece.targets[direct:]:
                target.bytes[:] = array


def _direct(piece: Piece) -> bool:
    return len(piece.targets[0].bytes) >= DIRECT


def _scratch(size: int) -> memoryview:
    """A buffer of this thread, good until its next call."""
    if size > len(getattr(_buffers, "view", b"")):
        _buffers.view = memoryview(bytearray(size))
    return _buffers.view[:size]
