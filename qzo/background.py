"""Work beside the main thread, for what waits for a disk or computes outside of Python."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T]) -> "Future[T]":
    """Start a function in a thread of its own, which never keeps the process from ending.

    Returns:
        Its result, or the error that it raised, when it is there.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # it belongs to whoever asks for the result
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
