"""Fair times: CUDA graphs over cold weight copies, samples of all contenders interleaved, medians and spread.

A layer's weight is read from DRAM in real use, because the other layers of the model have pushed it out of L2 since
the last token. So a contender gets several copies of its weight, and a graph of launches that walks over them::

    graph      copy 0, copy 1, ... copy n-1, copy 0, ...        more bytes between two uses of a copy than L2 holds
    sample     as many replays of the graph as fill about 12 ms, between two CUDA events
    cell       a b c | c b a | a b c | ...                      warm-up rounds first, then the samples that count

The contenders of a cell take turns, so that all of them meet the same clocks and the same temperature, and the order
turns round each time, so that none always follows the hottest. Everything runs on one stream; a sample ends
before the next begins.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy

from marlin_cupy.device import import_cupy

Key = TypeVar("Key", bound=Hashable)

#: A graph walks over at least this many bytes of weights, and over four times the L2 cache.
COLD_BYTES = 200_000_000
COLD_L2 = 4
MAX_LAUNCHES = 64


@dataclass(frozen=True)
class Sampling:
    """How long and how often."""

    sample_ms: float = 12.0
    samples: int = 7
    warmup_rounds: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.sample_ms < math.inf:
            raise ValueError(f"sample_ms is {self.sample_ms:g}; use a number of milliseconds above 0.")

    def __str__(self) -> str:
        return (
            f"median of {self.samples} samples of about {self.sample_ms:g} ms each, p10 and p90 as spread, after "
            f"{self.warmup_rounds} warm-up samples per contender; contenders take turns within a cell"
        )


QUICK_SAMPLING = Sampling(sample_ms=6.0, samples=5, warmup_rounds=1)


class Summary(NamedTuple):
    """Of the samples of one contender, microseconds per launch."""

    median: float
    p10: float
    p90: float


class Replay(Protocol):
    """Work that can be enqueued again and again on the stream of the bench."""

    @property
    def launches(self) -> int:
        """Multiplications that one replay does."""

    def replay(self) -> None:
        """Enqueue all of them; returns before they are done."""


class Run(ABC):
    """A contender at one M. It is itself a Replay: one eager launch per weight copy."""

    @property
    @abstractmethod
    def launches(self) -> int:
        """The number of weight copies."""

    @abstractmethod
    def replay(self) -> None:
        """Launch once per weight copy, outside of any graph."""

    @abstractmethod
    def capture(self, rounds: int) -> Replay:
        """A CUDA graph that walks ``rounds`` times over the weight copies. Call ``replay`` before."""

    @abstractmethod
    def error(self, graph: Replay) -> float | None:
        """Relative Frobenius error of what ``graph`` writes for fresh inputs; None where nothing is computed."""


#: Milliseconds that so many replays in a row take on the GPU.
Timer = Callable[[Replay, int], float]


def copies(weight_bytes: int, l2_bytes: int) -> int:
    """How many copies of a weight make it cold, at least 2 and at most MAX_LAUNCHES."""
    return min(max(2, math.ceil(max(COLD_L2 * l2_bytes, COLD_BYTES) / weight_bytes)), MAX_LAUNCHES)


def is_cold(weight_bytes: int, count: int, l2_bytes: int) -> bool:
    """Whether more bytes than L2 holds pass between two uses of the same copy."""
    return (count - 1) * weight_bytes > l2_bytes


def rounds(count: int, round_ms: float, sample_ms: float) -> int:
    """How often a graph walks over ``count`` copies: up to MAX_LAUNCHES launches, and no longer than a sample."""
    return max(1, min(MAX_LAUNCHES // count, int(sample_ms / max(round_ms, 1e-6))))


def summarize(samples: Sequence[float]) -> Summary:
    """Median, 10th and 90th percentile, interpolated."""
    p10, median, p90 = numpy.percentile(samples, (10, 50, 90))
    return Summary(float(median), float(p10), float(p90))


def prepare(run: Run, time: Timer, sampling: Sampling) -> Replay:
    """Warm ``run`` up (kernels compiled, memory pools filled), then capture it."""
    run.replay()
    return run.capture(rounds(run.launches, time(run, 1), sampling.sample_ms))


def interleave(graphs: Mapping[Key, Replay], time: Timer, sampling: Sampling) -> dict[Key, Summary]:
    """Sample all ``graphs`` in turns: microseconds per launch of each."""
    replays = {}
    for name, graph in graphs.items():
        time(graph, 1)
        replays[name] = max(1, round(sampling.sample_ms / max(time(graph, 1), 1e-6)))
    samples: dict[Key, list[float]] = {name: [] for name in graphs}
    order = list(graphs)
    for turn in range(sampling.warmup_rounds + sampling.samples):
        for name in order if turn % 2 == 0 else reversed(order):
            milliseconds = time(graphs[name], replays[name])
            if turn >= sampling.warmup_rounds:
                samples[name].append(1e3 * milliseconds / (replays[name] * graphs[name].launches))
    return {name: summarize(values) for name, values in samples.items()}


class EventTimer:
    """Times replays on a CuPy stream with CUDA events. A Timer."""

    def __init__(self, stream: Any) -> None:
        self._cuda = import_cupy("timing").cuda
        self._stream = stream
        self._first, self._last = self._cuda.Event(), self._cuda.Event()

    def __call__(self, replay: Replay, count: int) -> float:
        """Milliseconds of ``count`` replays; waits for them."""
        if count > 2:
            replay.replay()  # the GPU has work when the clock starts: no sample holds the latency of a launch
        self._first.record(self._stream)
        for _ in range(count):
            replay.replay()
        self._last.record(self._stream)
        self._last.synchronize()
        return float(self._cuda.get_elapsed_time(self._first, self._last))


class CupyGraph:
    """A captured CUDA graph, and the memory pool that its scratch came from. A Replay."""

    def __init__(self, graph: Any, stream: Any, launches: int, pool: Any) -> None:
        self.launches = launches
        self._graph, self._stream = graph, stream
        self._pool = pool

    def replay(self) -> None:
        """Launch the graph."""
        self._graph.launch(self._stream)


class CupyRun(Run):
    """Launches on CuPy's current stream.

    Scratch that a launch allocates comes from a pool that nothing else uses: the graph goes on writing to it after
    the launch has given it back.
    """

    def __init__(
        self, stream: Any, steps: Sequence[Callable[[], object]], error: Callable[[Replay], float] | None
    ) -> None:
        self._cuda = import_cupy("the benchmark").cuda
        self._stream, self._steps, self._error = stream, steps, error
        self._pool = self._cuda.MemoryPool()

    @property
    def launches(self) -> int:
        """One per step."""
        return len(self._steps)

    def replay(self) -> None:
        """All steps."""
        with self._cuda.using_allocator(self._pool.malloc), self._stream:
            for step in self._steps:
                step()

    def capture(self, rounds: int) -> Replay:
        """Through CuPy's stream capture."""
        with self._cuda.using_allocator(self._pool.malloc), self._stream:
            self._stream.begin_capture()
            try:
                for _ in range(rounds):
                    for step in self._steps:
                        step()
            except BaseException:
                with contextlib.suppress(Exception):  # the capture may be invalid; its error would hide the cause
                    self._stream.end_capture()
                raise
            graph = self._stream.end_capture()
        return CupyGraph(graph, self._stream, rounds * self.launches, self._pool)

    def error(self, graph: Replay) -> float | None:
        """As the contender checks itself."""
        if self._error is None:
            return None
        with self._stream:
            return self._error(graph)
