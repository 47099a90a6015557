"""Loaded kernels and their launch: the context, the argument block, counters that several streams can share."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Iterator
from typing import Any

from marlin_cupy.device import import_cupy
from marlin_cupy.jit.compile import cubin

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_PER_THREAD_STREAM = 2  # CU_STREAM_PER_THREAD: one handle, a stream per host thread
_COUNTERS_PER_CHUNK = 1 << 18
#: Counters that a launch can use: the largest number of output tiles with stripes that cut tiles.
MAX_COUNTERS = 4096


class Function:
    """The kernel of a cubin on one GPU."""

    def __init__(self, image: bytes, device: int, entry: str, shared_bytes: int) -> None:
        cupy = import_cupy("launching a kernel")
        from cupy_backends.cuda.api import driver, runtime

        self._driver, self._runtime = driver, runtime
        self.device = device
        self.shared_bytes = shared_bytes
        with _uncaptured(), cupy.cuda.Device(device):
            self._module = cupy.cuda.function.Module()
            self._module.load(image)
            self._function = self._module.get_function(entry)
            driver.funcSetAttribute(
                self._function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes
            )

    def blocks_per_sm(self, threads: int) -> int:
        """How many blocks of this kernel one SM holds."""
        with import_cupy("occupancy").cuda.Device(self.device):
            return int(
                self._driver.occupancyMaxActiveBlocksPerMultiprocessor(self._function.ptr, threads, self.shared_bytes)
            )

    def launch(self, blocks: int, threads: int, stream: int, arguments: ArgumentBlock) -> None:
        """Enqueue on ``stream``. ``arguments`` is copied before this returns."""
        if self._driver.ctxGetCurrent() == 0 or self._runtime.getDevice() != self.device:
            self._launch_on_device(blocks, threads, stream, arguments)
        else:
            self._driver.launchKernel(
                self._function.ptr, blocks, 1, 1, threads, 1, 1, self.shared_bytes, stream, arguments.parameters, 0
            )

    def _launch_on_device(self, blocks: int, threads: int, stream: int, arguments: ArgumentBlock) -> None:
        previous = self._runtime.getDevice()
        self._runtime.setDevice(self.device)  # binds the primary context to a thread that has none
        try:
            self._driver.launchKernel(
                self._function.ptr, blocks, 1, 1, threads, 1, 1, self.shared_bytes, stream, arguments.parameters, 0
            )
        finally:
            self._runtime.setDevice(previous)


class ArgumentBlock(threading.local):
    """Memory for a kernel's one by-value struct argument, a copy per host thread."""

    def __init__(self, size: int) -> None:
        self.data = ctypes.create_string_buffer(size)
        self._pointer = ctypes.c_void_p(ctypes.addressof(self.data))
        self.parameters = ctypes.addressof(self._pointer)


@functools.cache
def load(name: str, source: str, arch: str, device: int, entry: str, shared_bytes: int) -> Function:
    """The kernel ``entry`` of ``source``, compiled for ``arch`` unless it was before, loaded on GPU ``device``."""
    return Function(cubin(name, source, arch), device, entry, shared_bytes)


class Counters:
    """Zeroed device words for kernels that leave them zero, so that launches in one stream can share them.

    Each stream has a range of its own; each captured launch gets one that nothing else ever uses, since a graph
    may run on any stream.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._chunks: list[Any] = []
        self._free = 0
        self._of_stream: dict[tuple[int, int], int] = {}
        from cupy_backends.cuda.api import runtime

        self._is_capturing = runtime.streamIsCapturing

    def address(self, stream: int, count: int) -> int:
        """Device address of ``count`` (at most MAX_COUNTERS) zeros for a launch on ``stream``."""
        if self._is_capturing(stream):
            return self._take(count)
        key = stream, threading.get_ident() if stream == _PER_THREAD_STREAM else 0
        found = self._of_stream.get(key)
        if found is None:
            found = self._of_stream[key] = self._take(MAX_COUNTERS)
        return found

    def _take(self, count: int) -> int:
        with self._lock:
            if self._free < count:
                cupy = import_cupy("counters")
                with _uncaptured(), cupy.cuda.Device(self._device), cupy.cuda.Stream(non_blocking=True) as stream:
                    memory = cupy.cuda.memory.alloc(4 * _COUNTERS_PER_CHUNK)
                    memory.memset_async(0, 4 * _COUNTERS_PER_CHUNK, stream)
                    stream.synchronize()
                self._chunks.append(memory)
                self._free = _COUNTERS_PER_CHUNK
            self._free -= count
            return int(self._chunks[-1].ptr) + 4 * self._free


@functools.cache
def counters(device: int) -> Counters:
    """The counters of GPU ``device``."""
    return Counters(device)


@functools.cache
def driver_library() -> ctypes.CDLL:
    """The CUDA driver, for calls that CuPy does not pass on."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@contextlib.contextmanager
def _uncaptured() -> Iterator[None]:
    """Let this thread allocate and load modules while one of its streams is captured into a graph."""
    mode = ctypes.c_int(_RELAXED)
    driver_library().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        driver_library().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
