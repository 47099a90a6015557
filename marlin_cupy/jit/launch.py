"""Loaded kernels and their launch: plain or dependent, the argument block, counters that several streams can share."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
import sys
import threading
from collections.abc import Hashable, Iterator
from typing import Any

from marlin_cupy.device import import_cupy
from marlin_cupy.errors import DeviceError
from marlin_cupy.jit.compile import cubin
from marlin_cupy.writes import Writes

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_PER_THREAD_STREAM = 2  # CU_STREAM_PER_THREAD: one handle, a stream per host thread
_CAPTURE_NONE, _CAPTURE_ACTIVE = 0, 1  # CU_STREAM_CAPTURE_STATUS_*
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_*
#: CUlaunchAttribute: id, padding, a union of 64 bytes, of which this attribute uses an int.
_ATTRIBUTE = struct.Struct("=i4xi60x")
#: CUlaunchConfig: grid and block (x, y, z), dynamic shared memory, stream, attributes and their number.
_CONFIG = struct.Struct("=7I4x2QI4x")
#: The one attribute of a dependent launch, never changed.
_DEPENDENT = ctypes.create_string_buffer(_ATTRIBUTE.pack(_PROGRAMMATIC_STREAM_SERIALIZATION, 1), _ATTRIBUTE.size)
_ATTRIBUTES = ctypes.addressof(_DEPENDENT)
_pack_config = _CONFIG.pack_into
_COUNTERS_PER_CHUNK = 1 << 18
#: Counters that a launch can use: the largest number of output tiles with stripes that cut tiles.
MAX_COUNTERS = 4096


class Function:
    """The kernel of a cubin on one GPU.

    ``most_shared_bytes`` bounds what a launch may ask for; ``shared_bytes`` is what it gets if it does not ask.
    """

    def __init__(self, image: bytes, device: int, entry: str, shared_bytes: int, most_shared_bytes: int) -> None:
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
                self._function.ptr,
                driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                max(shared_bytes, most_shared_bytes),
            )
            self._set(self._function.ptr, driver.ctxGetCurrent(), driver, _launch_kernel_ex())

    def _set(self, pointer: int, context: int, driver: Any, launch_ex: Any) -> None:
        """What a launch takes: the kernel, the primary context of its GPU, the driver's functions."""
        self._pointer, self._handle, self._context = pointer, ctypes.c_void_p(pointer), context
        self._current_context = driver.ctxGetCurrent
        self._launch_plain, self._launch_ex = driver.launchKernel, launch_ex

    def blocks_per_sm(self, threads: int) -> int:
        """How many blocks of this kernel one SM holds."""
        with import_cupy("occupancy").cuda.Device(self.device):
            return int(
                self._driver.occupancyMaxActiveBlocksPerMultiprocessor(self._function.ptr, threads, self.shared_bytes)
            )

    def launch(
        self,
        blocks: int,
        threads: int,
        stream: int,
        arguments: ArgumentBlock,
        dependent: bool = False,
        shared_bytes: int = 0,
    ) -> None:
        """Enqueue on ``stream``. ``arguments`` is copied before this returns.

        Args:
            blocks, threads: of the grid, of a block.
            stream: handle.
            arguments: the kernel's struct.
            dependent: may start before the kernel ahead has finished; the kernel waits for it where it has to. This is
                unconditional, :meth:`launch_dependent` knows when it is safe.
            shared_bytes: dynamic shared memory of a block if not that of the constructor.
        """
        if self._current_context() != self._context:  # of another GPU, or none in a thread that has not used one yet
            previous = self._runtime.getDevice()
            self._runtime.setDevice(self.device)
            try:
                self._enqueue(blocks, threads, stream, arguments, dependent, shared_bytes or self.shared_bytes)
            finally:
                self._runtime.setDevice(previous)
        else:
            self._enqueue(blocks, threads, stream, arguments, dependent, shared_bytes or self.shared_bytes)

    def _enqueue(
        self, blocks: int, threads: int, stream: int, arguments: ArgumentBlock, dependent: bool, shared_bytes: int
    ) -> None:
        """In the context of this GPU."""
        if dependent:
            config, address, parameters = arguments.dependent
            _pack_config(config, 0, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, _ATTRIBUTES, 1)
            code = self._launch_ex(address, self._handle, parameters, None)
            if code != 0:
                raise DeviceError(f"the GPU driver refused a dependent launch: {_error_name(code)}.")
        else:
            block, given = (threads, 1, 1), arguments.parameters
            self._launch_plain(self._pointer, blocks, 1, 1, *block, shared_bytes, stream, given, 0)

    def launch_dependent(
        self,
        writes: Writes,
        blocks: int,
        threads: int,
        stream: int,
        arguments: ArgumentBlock,
        shared_bytes: int = 0,
    ) -> None:
        """A dependent launch where ``writes`` says that no weight can be read too early, else a plain one.

        ``shared_bytes`` is that of a dependent launch.
        """
        past = writes.past  # looked at, and added to below: this very set, see Writes
        key: Hashable = stream if stream != _PER_THREAD_STREAM else (stream, threading.get_ident())
        if key in past:
            self.launch(blocks, threads, stream, arguments, True, shared_bytes)
            return
        status, capture = capture_of(stream)
        if status != _CAPTURE_NONE:
            key = "capture", capture, key
        if status == _CAPTURE_ACTIVE and key in past:
            self.launch(blocks, threads, stream, arguments, True, shared_bytes)
            return
        self.launch(blocks, threads, stream, arguments)
        if status in (_CAPTURE_NONE, _CAPTURE_ACTIVE):
            past.add(key)  # only now: another thread may launch on this stream, and its launch has to be behind ours


class ArgumentBlock(threading.local):
    """Memory for a kernel's one by-value struct argument and for the description of its launch, per host thread."""

    def __init__(self, size: int) -> None:
        self.data = ctypes.create_string_buffer(size)
        self._pointer = ctypes.c_void_p(ctypes.addressof(self.data))
        self.parameters = ctypes.addressof(self._pointer)
        config = ctypes.create_string_buffer(_CONFIG.size)
        # One look-up in a thread's own storage. The driver takes these as they are; numbers would be converted.
        self.dependent = config, ctypes.byref(config), ctypes.byref(self._pointer)


@functools.cache
def load(
    name: str, source: str, arch: str, device: int, entry: str, shared_bytes: int, most_shared_bytes: int = 0
) -> Function:
    """The kernel ``entry`` of ``source``, compiled for ``arch`` unless it was before, loaded on GPU ``device``."""
    return Function(cubin(name, source, arch), device, entry, shared_bytes, most_shared_bytes)


class Counters:
    """Zeroed device words for kernels that leave them zero, so that launches in one stream can share them.

    Each stream has a range of its own; each captured launch gets one that no other launch ever uses, since a graph
    may run on any stream. Runs of one instance of a graph follow one another. Two instances of one captured graph share
    these words, partial tiles, y and whatever else was captured: they must not run at the same time. Nobody here is
    told of instances, so that cannot be refused.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._chunks: list[Any] = []
        self._free = 0
        self._of_stream: dict[tuple[int, int], int] = {}
        self._beside: dict[tuple[int, int], int] = {}
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

    def beside(self, memory: int, count: int) -> int:
        """Device address of ``count`` zeros for launches with exchange memory at that address, which never overlap."""
        key = memory, count
        found = self._beside.get(key)
        if found is None:
            found = self._beside[key] = self._take(count)
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


# ---- the driver, for what CuPy does not pass on. With CDLL, which lets other threads run Python meanwhile: a launch
# into a full queue waits, perhaps for a host callback in Python, and would wait forever if it kept them out.


@functools.cache
def driver_library() -> ctypes.CDLL:
    """The CUDA driver."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@functools.cache
def _launch_kernel_ex() -> Any:
    """Without argument types: launches pass objects of ctypes alone."""
    return driver_library().cuLaunchKernelEx


def _error_name(code: int) -> str:
    name = ctypes.c_char_p()
    driver_library().cuGetErrorName(code, ctypes.byref(name))
    return f"{name.value.decode() if name.value else 'unknown error'} ({code})"


def capture_of(stream: int) -> tuple[int, int]:
    """Whether ``stream`` is captured into a graph (CU_STREAM_CAPTURE_STATUS_*, -1 where that cannot be told), and an
    id of the capture that no other ever has.
    """
    status, capture = ctypes.c_int(), ctypes.c_ulonglong()
    code = driver_library().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(capture), None, None, None
    )
    return (int(status.value), int(capture.value)) if code == 0 else (-1, 0)


@contextlib.contextmanager
def _uncaptured() -> Iterator[None]:
    """Let this thread allocate and load modules while one of its streams is captured into a graph."""
    mode = ctypes.c_int(_RELAXED)
    driver_library().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        driver_library().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
