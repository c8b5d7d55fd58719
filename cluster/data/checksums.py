"""Checksums of arrays that are received in their place, computed while they are received.

The bytes that came last are still in the processor's cache then. To compute the CRC32C of 42 MB after all of it has come reads it
from memory again, at twice the cost.
"""

from fastcrc.crc32 import iscsi as crc32c

from cluster.data.ranges import ReceiveBuffers


class RunningChecksums:
    """The checksums of one range, from the pieces of its buffers in their order, whatever the pieces' lengths.

    Args:
        buffers: where the range is received.

    Attributes:
        of: for each entry of the plan whose array is received in its place, the CRC32C of its member as far as it has come.
    """

    def __init__(self, buffers: ReceiveBuffers):
        self.of: dict[int, int] = {}
        self._scratch, self._arrays = buffers.scratch.obj, iter(buffers.direct.items())
        self._number = self._left = 0

    def update(self, piece: memoryview) -> None:
        """Add the next piece that was received."""
        if piece.obj is self._scratch:
            return
        if not self._left:
            self._number, (header, self._left) = next(self._arrays)
            self.of[self._number] = crc32c(header)
        self.of[self._number] = crc32c(piece, self.of[self._number])
        self._left -= len(piece)
