"""Pages of mapped files: which ones a tensor lies in, reading them ahead, letting them go.

Letting go is ``madvise(MADV_DONTNEED)``: on a mapped file nothing is lost, the next access reads
the page again, from the page cache or from the disk. On any other memory it would erase the data,
so ranges are made only from what ``/proc/self/maps`` says is a file.
"""

import ctypes
import mmap
import os
import sys
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qzo.errors import ConfigError

_MADV_WILLNEED, _MADV_DONTNEED = 3, 4  # <sys/mman.h> of Linux
_READ_AHEAD_BYTES = 2**17  # the kernel reads no more than its read-ahead window for one call


@dataclass(frozen=True)
class FileMap:
    """A file, or a part of it, in the memory of this process."""

    start: int
    stop: int
    offset: int
    path: str


@dataclass(frozen=True)
class PageRange:
    """Whole pages of a mapped file.

    Attributes:
        start: Address of the first.
        num_bytes: Their size.
        offset: Where they are in the file.
        path: The file.
    """

    start: int
    num_bytes: int
    offset: int
    path: str

    def read_ahead(self) -> None:
        """Ask the system to read them; the process does not grow by it."""
        for begin in range(0, self.num_bytes, _READ_AHEAD_BYTES):
            size = min(_READ_AHEAD_BYTES, self.num_bytes - begin)
            _madvise(self.start + begin, size, _MADV_WILLNEED)

    def release(self) -> None:
        """Let them go; the page cache may keep them."""
        _madvise(self.start, self.num_bytes, _MADV_DONTNEED)

    def drop_from_cache(self) -> None:
        """Let them go from the page cache too."""
        file = os.open(self.path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, self.offset, self.num_bytes, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def file_maps() -> list[FileMap]:
    """Return the files that are mapped into this process, by address.

    Raises:
        ConfigError: This is not Linux.
    """
    if sys.platform != "linux":
        raise ConfigError(f"memory_limit: expected Linux, got {sys.platform}; leave it out")
    maps = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        addresses, _, offset, _, inode, *path = line.split(maxsplit=5)
        if inode != "0" and path:
            start, stop = (int(address, 16) for address in addresses.split("-"))
            maps.append(FileMap(start, stop, int(offset, 16), path[0]))
    return maps


def page_ranges(tensors: Iterable[Tensor], maps: Sequence[FileMap]) -> list[PageRange]:
    """Return the whole pages inside of some tensors; what lies in no mapped file is left out.

    Args:
        tensors: On a CPU, contiguous or transposed.
        maps: From ``file_maps``, by address.
    """
    spans = sorted({(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.nbytes})
    starts = [entry.start for entry in maps]
    ranges = []
    for start, stop in _joined(spans):
        place = bisect_right(starts, start) - 1
        if place < 0 or stop > maps[place].stop:
            continue
        first, last = -(-start // mmap.PAGESIZE), stop // mmap.PAGESIZE
        if first < last:
            address, size = first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE
            entry = maps[place]
            offset = entry.offset + address - entry.start
            ranges.append(PageRange(address, size, offset, entry.path))
    return ranges


def whole_maps(ranges: Iterable[PageRange], maps: Sequence[FileMap]) -> list[PageRange]:
    """Return all pages of the maps that some ranges lie in; tensors there keep them mapped."""
    starts = [entry.start for entry in maps]
    places = sorted({bisect_right(starts, pages.start) - 1 for pages in ranges})
    held = [maps[place] for place in places]
    return [PageRange(m.start, m.stop - m.start, m.offset, m.path) for m in held]


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join spans of addresses that touch, so that no page between two of them is left out."""
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def _madvise(address: int, size: int, advice: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    arguments = ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(advice)
    if library.madvise(*arguments):
        error = ctypes.get_errno()
        raise OSError(error, f"madvise: {os.strerror(error)}")
