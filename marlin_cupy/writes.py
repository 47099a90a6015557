"""When a launch may be dependent: never the first one on a stream after a weight was written.

A dependent launch (CUDA's programmatic dependent launch) may read its weight while kernels ahead of it on the stream
still run, back to the last plain launch. So no kernel among those may write the weight:

    stream   ... [writes W] [matmul, plain] [your kernel] [matmul, dependent] [matmul, dependent] ...
                           |                            |<- read W from here
                           the write is complete before this starts, and before all that follows

Which weight was written is not asked: a plain launch with any weight orders the stream behind all writes ahead of it,
and two tensors can share memory, which nobody would notice. One record per GPU is therefore safe where one per tensor
is not, and it costs one plain launch per stream instead of one per weight.

It is kept per stream, since a plain launch on stream A says nothing of a write on stream B. (Work of another stream
has to be waited for, by event or from the host, whatever the launch: a dependent launch overlaps with the kernel ahead
of it, not with a wait.) For the same reason a destroyed stream whose handle returns does no harm: a write on the new
stream itself is recorded after it.
A graph that is being captured is a stream of its own, because capturing runs nothing. When it is launched, all ahead of
it on the stream completes first, so only what was captured counts.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator


class _NoStream(set[Hashable]):
    """Stays empty: while a weight is being written no launch settles anything."""

    def add(self, stream: Hashable) -> None:
        """Nothing."""


class Writes:
    """The streams of one GPU that had a plain launch since a weight was last written.

    ``past`` is replaced, never emptied. A launch takes the set, looks, launches, and adds its stream to that same set
    if it was plain; where a write has come between, the set it adds to is out of use, and the next launch is plain
    again. Reading takes no lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._writers = 0
        self.past: set[Hashable] = set()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around the code that enqueues writes to a weight."""
        with self._lock:
            self._writers += 1
            self.past = _NoStream()
        try:
            yield
        finally:
            with self._lock:
                self._writers -= 1
                self.past = _NoStream() if self._writers else set()

    def mark(self) -> None:
        """A write has been enqueued."""
        with self.writing():
            pass


_of_gpu: dict[int, Writes] = {}


def of_gpu(index: int) -> Writes:
    """The record of GPU ``index``, the same object for all threads."""
    return _of_gpu.setdefault(index, Writes())
