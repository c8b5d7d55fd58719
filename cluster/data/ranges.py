"""Which ranged reads bring the arrays that are wanted, and where their bytes are received.

Reads of neighbours are coalesced: one request for a range costs less than one for each member in it. A plan is kept in columns
rather than objects: a window of small arrays has many thousands of members, and each of them should cost microseconds.
"""

import threading
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

GAP = 64 << 10
"""Unwanted bytes between two members that are always read along: another request costs more."""

WIDE_GAP = 512 << 10
"""The same where at least half of the range is wanted all the same."""

MAX_COALESCED = 2 << 20
"""Bytes of a range beyond which no further clip is coalesced into it: then several threads that read side by side are faster."""

MAX_COALESCED_CLIP = 64 << 20
"""The same within one clip: a person of the official data is 42 MB."""

DIRECT = 256 << 10
"""Bytes of an array from which on it is received in its place; smaller ones come many at a time and are copied there."""

_buffers = threading.local()


class Range(NamedTuple):
    """One ranged read of a shard: `length` bytes from `start` on, for the plan's entries from `first` up to `last`, which is excluded."""

    shard: int
    start: int
    length: int
    first: int
    last: int


@dataclass(frozen=True)
class ReadPlan:
    """Arrays that are to be read, in the order of shards and offsets; the same array may be there several times.

    Each array is an entry, known by its number: its place in the columns `row` to `crc`.

    Attributes:
        places: for each kind of array, the bytes where they go, one row after the other.
        widths: bytes of a row of each.
        row: where the array goes.
        kind: which of the places it goes to.
        shard: position of its shard in the split.
        clip: its clip's row in the shard's index.
        member: its number in the manifest.
        offset: of its member in the tar.
        size: of the member.
        crc: CRC32C of the member.
    """

    places: list[memoryview]
    widths: list[int]
    row: list[int]
    kind: list[int]
    shard: list[int]
    clip: list[int]
    member: list[int]
    offset: list[int]
    size: list[int]
    crc: list[int]

    def place(self, number: int) -> memoryview:
        """Where the array of an entry goes."""
        kind, row = self.kind[number], self.row[number]
        width = self.widths[kind]
        return self.places[kind][row * width : (row + 1) * width]

    def direct(self, number: int) -> bool:
        """Whether the array of an entry is received in its place."""
        return self.widths[self.kind[number]] >= DIRECT

    def coalesce(self, group: list[bool] | None = None) -> list[Range]:
        """As few ranges as bring all entries.

        Args:
            group: which of two groups each entry is in, where a range must not have entries of both.
        """
        cuts, start, end, wanted = [0], 0, 0, 0
        for number, (shard, offset, size) in enumerate(zip(self.shard, self.offset, self.size, strict=True)):
            if number and shard == self.shard[number - 1]:
                if offset == self.offset[number - 1]:  # the same array once more
                    continue
                gap, whole = offset - end, offset + size - start
                near = gap <= GAP or (gap <= WIDE_GAP and 2 * (wanted + size) >= whole)
                small = whole <= (MAX_COALESCED_CLIP if self.clip[number] == self.clip[number - 1] else MAX_COALESCED)
                if near and small and (group is None or group[number] == group[number - 1]):
                    wanted, end = wanted + size, offset + size
                    continue
            if number:
                cuts.append(number)
            start, end, wanted = offset, offset + size, size
        return self._ranges(cuts, len(self.shard))

    def single(self, span: Range) -> list[Range]:
        """A range for each member of this one."""
        cuts = [number for number in range(span.first, span.last) if number == span.first or self.offset[number] != self.offset[number - 1]]
        return self._ranges(cuts, span.last)

    def _ranges(self, cuts: list[int], end: int) -> list[Range]:
        """The ranges that begin with these entries; the last one ends before entry `end`."""
        ranges = []
        for first, last in pairwise([*cuts, end]):
            start, final = self.offset[first], last - 1
            ranges.append(Range(self.shard[first], start, self.offset[final] + self.size[final] - start, first, last))
        return ranges


class ReceiveBuffers:
    """Where the bytes of one range are received: large arrays in their place, all else in a scratch buffer of this thread.

    Here a range has three members: a and c are small, the array of B is large. One character is one byte; h is the header of a
    .npy file, and dots are what lies between members (padding, the tar's own headers, arrays that are not wanted):

      tar        ...haa....hBBBBBB....hcc...
      range         haa....hBBBBBB....hcc         21 bytes from byte 3 of the tar on
      scratch       haa....h      ....hcc         15 bytes side by side: B's array is not in there
      places                BBBBBB                6 bytes where B's array is wanted
      buffers       [  0   ][ 1  ][  2  ]         scratch[0:8], the place of B, scratch[8:15]
      at            0      7          12          offsets in scratch: a, the header of B, c

    Attributes:
        buffers: parts of scratch and places, to be filled one after the other.
        scratch: the thread's buffer.
        at: for each entry, where its member, or the header of one that is received in its place, begins in scratch.
        direct: for each entry whose array is received in its place, in their order: its member's header, and the bytes of the array.
    """

    def __init__(self, plan: ReadPlan, span: Range):
        numbers = range(span.first, span.last)
        direct = {plan.offset[number]: number for number in reversed(numbers) if plan.direct(number)}
        self.direct: dict[int, tuple[memoryview, int]] = {}
        self.scratch = _scratch(span.length - sum(plan.widths[plan.kind[number]] for number in direct.values()))
        self.buffers: list[memoryview] = []
        self.at: list[int] = []
        done = skipped = 0
        for number in numbers:
            offset = plan.offset[number]
            if direct.get(offset) == number:
                width = plan.widths[plan.kind[number]]
                begin = offset - span.start - skipped
                body = begin + plan.size[number] - width
                self.buffers += [self.scratch[done:body], plan.place(number)]
                self.direct[number] = self.scratch[begin:body], width
                done, skipped = body, skipped + width
                self.at.append(begin)
            else:
                self.at.append(self.at[-1] if offset in direct else offset - span.start - skipped)
        if len(self.scratch) > done:
            self.buffers.append(self.scratch[done:])


def _scratch(size: int) -> memoryview:
    """A buffer of this thread, good until its next call."""
    if size > len(getattr(_buffers, "view", b"")):
        _buffers.view = memoryview(bytearray(size))
    return _buffers.view[:size]
