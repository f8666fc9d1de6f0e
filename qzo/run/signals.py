"""SIGINT and SIGTERM finish the step at hand; a second one ends the process at once.

A checkpoint is read where it lies in the page cache. If somebody cuts a file short under a run, the
next access is a bus error, which ends the process; ``explained_bus_errors`` has it say why first.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LAST_SECONDS = 5
_ECHO_SECONDS = 1.0  # a launcher may pass on a signal that its processes got already


@contextmanager
def stop_signals(ask_to_stop: Callable[[], None]) -> Iterator[None]:
    """Call ``ask_to_stop`` at the first signal while the block runs.

    Only the main thread hears signals; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
    heard: dict[int, float] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        ask_to_stop()
        first = heard.setdefault(number, time.monotonic())
        if time.monotonic() - first > _ECHO_SECONDS:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for number in _SIGNALS:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in _SIGNALS:
            signal.signal(number, before[number])


@contextmanager
def explained_bus_errors(files: Iterable[Path]) -> Iterator[None]:
    """Name the file that was cut short where a bus error ends the process. On Linux.

    Python cannot handle a bus error itself: its handlers run only after the instruction that
    failed, which fails again.

    Args:
        files: What is mapped into memory.
    """
    if sys.platform != "linux":
        yield
        return
    sizes = {path: path.stat().st_size for path in files}

    def explain(_: int) -> None:
        signal.alarm(_LAST_SECONDS)  # should this hang, that ends it
        cut = [str(path) for path, size in sizes.items() if _size(path) < size]
        names = ", ".join(cut) or "a file of the model"
        message = (
            f"qzo: {names}: was cut short or cannot be read any more while it was in use; the "
            "journal holds every finished step: restore the file, then resume_from_checkpoint=true"
        )
        os.write(2, message.encode("utf-8") + b"\n")
        os._exit(1)

    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(explain)
    before = libc.signal(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGBUS, before)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
