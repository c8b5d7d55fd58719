"""One tar that another program wrote: where each array of its clips is, with its checksum, and whether it fits the dataset.

A clip is a sample of WebDataset: files that follow each other and share the path up to the first dot of their name. Of these,
`<key>.<person>.<stream>.npy` are the persons' arrays, in any order; all others are ignored.
"""

import math
import re
import tarfile
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, NoReturn

import numpy as np
from fastcrc.crc32 import iscsi as crc32c

from cluster.data.sequential import SequentialReader
from cluster.data.shards import NPY, index_dtype, npy_header
from reactdiff.clip import PERSONS, TARGETS, WINDOW
from reactdiff.data.paths import key_of

ARRAY = re.compile(rf"(?:{'|'.join(PERSONS)})\.([A-Za-z0-9_-]+)\.npy")
ALIGNED = 16
"""What a .npy file's header is padded to, at least."""


@dataclass(frozen=True)
class ClipFormat:
    """What every person of a dataset has: frames, and the width of each array."""

    frames: int
    widths: dict[str, int]

    @property
    def members(self) -> tuple[str, ...]:
        """The members of every clip, in the order of the index."""
        return tuple(f"{person}.{name}.npy" for person in PERSONS for name in sorted(self.widths))

    def array(self, name: str) -> tuple[tuple[int, int], np.dtype]:
        """Shape and dtype of an array."""
        return (self.frames, self.widths[name]), np.dtype(np.float32 if name in TARGETS else np.float16)


class Member(NamedTuple):
    """A file in the tar: path up to the first dot of its name, the name after it, its offset, and its size in bytes."""

    path: str
    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        """Its clip's key."""
        return key_of(self.path)

    @property
    def array(self) -> str:
        """Name of the person's array that it is; empty if it is none."""
        match = ARRAY.fullmatch(self.name)
        return match[1] if match else ""


class TarScan:
    """One pass over a tar.

    Args:
        file: the tar.

    Attributes:
        ignored: files so far that are no arrays of a person.
    """

    def __init__(self, file: SequentialReader):
        self._file = file
        self.ignored = 0

    def samples(self) -> Iterator[tuple[Member, Iterator[Member]]]:
        """The first file of each sample, and its arrays, each of which must be used before the next one is asked for.

        Raises:
            ValueError: if the tar is damaged, cut off or compressed, or keeps an array otherwise than byte by byte.
        """
        members = self._members()
        following = next(members, None)

        def sample(path: str) -> Iterator[Member]:
            nonlocal following
            while following is not None and following.path == path:
                if following.array:
                    yield following
                else:
                    self.ignored += 1
                following = next(members, None)

        while following is not None:
            yield following, sample(following.path)

    def refuse(self, member: Member, rule: str, name: str = "") -> NoReturn:
        """Raise an error that says why a clip cannot be used: because of this member, or of the one that is named."""
        where = f"{self._file.key}: clip {member.key}, member {name or member.name}"
        raise ValueError(f"{where}: {rule}; correct the clip or leave it out, and write the tar again")

    def header(self, member: Member) -> tuple[tuple[int, ...], np.dtype, int]:
        """Shape and dtype in the header of a .npy file, and the header's CRC32C; the array's bytes are read next."""
        self._file.seek(member.offset)
        header = self._file.read(min(10, member.size)) or b""
        if header[:8] != NPY:
            what = f"has version {header[6]}.{header[7]}" if header[:6] == NPY[:6] and len(header) > 7 else "is something else"
            self.refuse(member, f"it must be a .npy file of version 1.0, but {what}")
        header += self._file.read(int.from_bytes(header[8:10], "little")) or b""
        try:
            shape, dtype = npy_header(header)
        except (ValueError, SyntaxError, tokenize.TokenError) as error:
            self.refuse(member, f"its .npy header cannot be used ({error})")
        if len(header) % ALIGNED:
            self.refuse(member, f"its .npy header has {len(header)} bytes, but must have a multiple of {ALIGNED}")
        if member.size != (whole := len(header) + dtype.itemsize * math.prod(shape)):
            self.refuse(member, f"it has {member.size} bytes, but {dtype} {shape} needs {whole}")
        return shape, dtype, crc32c(header)

    def checksum(self, member: Member, form: ClipFormat) -> int:
        """The CRC32C of an array that fits the dataset; one that does not is refused."""
        shape, dtype, crc = self.header(member)
        expected = form.array(member.array)
        if (shape, dtype) != expected:
            self.refuse(member, f"it is {dtype} {shape}, but must be {expected[1]} {expected[0]}")
        done = 0
        for piece in self._file.chunks(dtype.itemsize * math.prod(shape)):
            crc, numbers = crc32c(piece, crc), np.frombuffer(piece, dtype)
            finite = np.isfinite(numbers)
            if not finite.all():
                at = int(np.argmin(finite))
                row, column = divmod(done + at, shape[1])
                self.refuse(member, f"row {row}, column {column} is {numbers[at]}; all numbers must be finite")
            done += len(numbers)
        return crc

    def _members(self) -> Iterator[Member]:
        """The files of the tar that have a name and an extension; what WebDataset passes over is ignored."""
        try:
            with tarfile.open(fileobj=self._file, mode="r:", errors="replace") as tar:
                while (entry := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                    folder, slash, base = entry.name.removeprefix("./").rpartition("/")
                    stem, _, name = base.partition(".")
                    if stem and name and not entry.isdir():
                        member = Member(f"{folder}{slash}{stem}", name, entry.offset_data, entry.size)
                        if member.array and (not entry.isreg() or entry.issparse()):
                            self.refuse(member, "it is a link, or a file with holes, but must be plain")
                        if member.array and member.offset + member.size > self._file.size:
                            raise tarfile.ReadError(f"it ends inside {entry.name}")
                        yield member
                    elif not entry.isdir():
                        self.ignored += 1
        except tarfile.TarError as error:
            raise ValueError(
                f"{self._file.key} is no whole tar ({error}): copy it again, or write it again, without compression"
            ) from error
        self._assert_ended(tar.offset)

    def _assert_ended(self, offset: int) -> None:
        """After the last member there must be zeros only: `tarfile` ends without an error at a header that it cannot read."""
        self._file.seek(offset)
        if offset == self._file.size or any(np.frombuffer(piece, np.uint8).any() for piece in self._file.chunks(self._file.size - offset)):
            raise ValueError(
                f"{self._file.key}: behind its last readable member, from byte {offset} on, are not the zeros that end a tar; it was cut "
                "off, or damaged there, or put together of several: write it again"
            )


def first_format(file: SequentialReader) -> ClipFormat:
    """What the first clip of a tar has; whether every person and clip has it, `read_tar` says.

    Raises:
        ValueError: if it has no arrays, or they are not of a shape that a dataset can have.
    """
    scan = TarScan(file)
    widths: dict[str, int] = {}
    frames = 0
    for _, sample in islice(scan.samples(), 1):
        for member in sample:
            shape, _, _ = scan.header(member)
            if len(shape) != 2 or not shape[0] or shape[0] % WINDOW:
                scan.refuse(member, f"it is of shape {shape}, but must be (frames, width), with a multiple of {WINDOW} frames")
            frames, widths[member.array] = frames or shape[0], shape[1]
    if not widths:
        raise ValueError(f"{file.key}: its first sample has no member <key>.<person>.<stream>.npy, person {' or '.join(PERSONS)}")
    return ClipFormat(frames, widths | TARGETS)


def read_tar(file: SequentialReader, form: ClipFormat) -> tuple[np.ndarray, int]:
    """Read a tar from end to end.

    Returns:
        Its index, a row for each clip, and how many of its files are no arrays.

    Raises:
        ValueError: if anything in it does not fit, naming tar, clip, member, what was found and what should be there.
        StorageError: if it cannot be read.
    """
    scan, order = TarScan(file), form.members
    row, rows, keys = index_dtype(len(order)), bytearray(), set()
    for first, sample in scan.samples():
        clip: dict[str, tuple[int, int, int]] = {}
        for member in sample:
            if member.array not in form.widths:
                scan.refuse(member, f"the first clip of the dataset has no such array, only {', '.join(sorted(form.widths))}")
            if member.name in clip:
                scan.refuse(member, "the clip has it twice")
            clip[member.name] = (member.offset, member.size, scan.checksum(member, form))
        if missing := [name for name in order if name not in clip]:
            scan.refuse(first, f"the clip lacks it, and has {', '.join(sorted(clip)) or 'no array at all'}", missing[0])
        if first.key in keys:
            scan.refuse(first, "its clip was there before: members must lie side by side, and two clips must not have one key")
        keys.add(first.key)
        rows += np.array([(first.key.encode(), *zip(*(clip[name] for name in order), strict=True))], row).tobytes()
    if not rows:
        raise ValueError(f"{file.key} has no clips")
    return np.frombuffer(rows, row), scan.ignored
