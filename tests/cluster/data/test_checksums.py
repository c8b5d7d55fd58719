"""Checksums that are computed while bytes are received are those of whole members, whatever pieces the bytes come in."""

import numpy as np
import pytest
from fastcrc.crc32 import iscsi as crc32c

from cluster.data.checksums import RunningChecksums
from cluster.data.ranges import DIRECT, Range, ReadPlan, ReceiveBuffers
from reactdiff.data.keyed import generator


@pytest.mark.parametrize("most", [1000, 1 << 20])
def test_in_any_pieces_the_sums_are_those_of_the_members(most: int) -> None:
    """Three wide arrays, the second of them wanted twice, and a small one between them; a header of 128 bytes before each."""
    rng, header, small = generator("sums", most), 128, 1000
    kinds, again = [0, 1, 0, 0, 0], 3
    sizes = [header + (small if kind else DIRECT) for kind in kinds]
    offsets = [512 * (1 + 600 * (number - (number >= again))) for number in range(5)]
    places = [np.empty((5, width), dtype=np.uint8) for width in (DIRECT, small)]
    zeros = [0] * 5
    plan = ReadPlan(
        [memoryview(place.data).cast("B") for place in places],
        [DIRECT, small],
        *(list(range(5)), kinds, zeros, zeros, zeros, offsets, sizes, zeros),
    )
    end = offsets[-1] + sizes[-1]
    tar = rng.integers(0, 256, end, dtype=np.uint8).tobytes()
    target = ReceiveBuffers(plan, Range(0, offsets[0], end - offsets[0], 0, 5))
    sums, at = RunningChecksums(target), offsets[0]
    for buffer in target.buffers:
        done = 0
        while done < len(buffer):
            piece = buffer[done : done + int(rng.integers(1, most))]
            piece[:] = tar[at : at + len(piece)]
            sums.update(piece)
            done, at = done + len(piece), at + len(piece)
    assert at == end
    assert sums.of == {number: crc32c(tar[offsets[number] : offsets[number] + sizes[number]]) for number in (0, 2, 4)}
