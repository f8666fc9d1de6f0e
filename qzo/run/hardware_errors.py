"""Errors of the computer, not of the program: one line that says what to do.

Memory that is short, on a device or on the host; Triton without a C compiler or without Python's
headers; NCCL that cannot reach another GPU.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from qzo.errors import QZOError

_OF_A_CPU = "DefaultCPUAllocator"  # torch raises a plain RuntimeError there
_COMPILER = "Failed to find C compiler"  # so does Triton
_NUMBERS = re.compile(r"Tried to allocate ([\d.]+ \w+)|tried to allocate (\d+) bytes")
_CAPACITY = re.compile(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free")


@contextmanager
def hardware_errors(what_to_lower: str | Callable[[], str]) -> Iterator[None]:
    """Turn errors of the computer into one line.

    Args:
        what_to_lower: The end of the line where memory is short: which keys or flags to lower, and
            to what. A function is called when it is needed.

    Raises:
        QZOError: The block failed so.
        RuntimeError: It failed otherwise, and what it raised goes on; as the next two.
        MemoryError: See above.
        CalledProcessError: See above.
    """
    try:
        yield
    except (RuntimeError, MemoryError, subprocess.CalledProcessError) as error:
        if is_out_of_memory(error):
            raise QZOError(f"{_memory_line(error)}; {_words(what_to_lower)}") from error
        line = _other_line(error)
        if line is None:
            raise
        raise QZOError(line) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory was short, on a device or on the host."""
    import torch

    is_of_torch = isinstance(error, torch.OutOfMemoryError) or _OF_A_CPU in str(error)
    return is_of_torch or isinstance(error, MemoryError)


def _memory_line(error: BaseException) -> str:
    text = str(error)
    asked, capacity = _NUMBERS.search(text), _CAPACITY.search(text)
    where = "host" if _OF_A_CPU in text or isinstance(error, MemoryError) else "GPU"
    words = f"out of memory on the {where}"
    if asked is not None:
        num_bytes = asked[1] or f"{int(asked[2]) / 2**30:.2f} GiB"
        words += f": tried to allocate {num_bytes}"
    if capacity is not None:
        words += f", {capacity[2]} of {capacity[1]} are free"
    return words


def _words(what_to_lower: str | Callable[[], str]) -> str:
    if isinstance(what_to_lower, str):
        return what_to_lower
    with suppress(QZOError):
        return what_to_lower()
    return "lower per_device_train_batch_size or max_length, or set memory_limit"


def _other_line(error: BaseException) -> str | None:
    """Return the line of an error that is not about memory; None where it is not known."""
    from torch.distributed import DistBackendError

    first = (str(error).strip().splitlines() or [""])[0][:200]
    if _COMPILER in first:
        return (
            "Triton: expected a C compiler, which it needs to start a kernel, found none; install "
            "gcc (for example: apt install build-essential), or name one in the variable CC"
        )
    if isinstance(error, subprocess.CalledProcessError):
        command = error.cmd if isinstance(error.cmd, str) else " ".join(map(str, error.cmd[:1]))
        if not re.search(r"(cc|gcc|clang|\+\+)[-\d.]*$", command.split(" ")[0]):
            return None
        return (
            f"Triton: the C compiler {command.split(' ')[0]} failed; install Python's headers (for "
            "example: apt install python3-dev), or name another compiler in the variable CC"
        )
    if isinstance(error, DistBackendError) or first.startswith("NCCL"):
        return (
            f"processes: NCCL failed ({first}); see that every process has a GPU of its own, and "
            "run again with NCCL_DEBUG=INFO for the reason"
        )
    return None
