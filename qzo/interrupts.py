"""SIGINT and SIGTERM finish the step at hand; a second one ends the process at once."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
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
