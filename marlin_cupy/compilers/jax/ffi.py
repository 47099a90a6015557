"""XLA's foreign function interface without a compiled extension: a handler in Python, through ctypes.

Layouts are those of ``xla/ffi/api/c_api.h`` (API 0.x), offsets in bytes on 64-bit machines. XLA calls the handler with
a call frame; when it is registered it calls once with a metadata extension instead, and learns the API version and that
calls can be recorded into command buffers (CUDA graphs). From then on it calls when it records, not when it runs.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

_pycapsule: Any = jax.ffi.pycapsule

_METADATA_EXTENSION = 1
_COMMAND_BUFFER_COMPATIBLE = 1
_INTERNAL = 13  # absl::StatusCode::kInternal
#: XLA_FFI_CallFrame, of 8-byte words; and which of them are what.
_FRAME = struct.Struct("=21Q")
_EXTENSION, _API, _CONTEXT = 1, 2, 3
_ARGUMENTS, _RESULTS = (7, 9), (12, 14)  # their number, an array of pointers to buffers
_ATTRIBUTES = 20  # an array of pointers to values; of a string that is a pointer and a length
_DATA = 24  # XLA_FFI_Buffer: its memory
# XLA_FFI_Extension_Base: type; XLA_FFI_Metadata_Extension: the metadata, in which version and traits are
_TYPE, _METADATA, _VERSION, _TRAITS = 8, 24, 24, 32
# XLA_FFI_Api: its version (size, extension, major, minor), then pointers to functions
_API_VERSION, _ERROR_CREATE, _STREAM_GET, _DEVICE_GET = 16 + 16, 48, 80, 184

_Function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
#: Functions that XLA keeps the addresses of, for ever.
_kept: list[Any] = []


class Call(NamedTuple):
    """What a handler is called with.

    Attributes:
        text: the one attribute of the call, in bytes.
        operands, results: addresses.
        stream: handle of the CUDA stream to launch on.
        device: number of the GPU.
    """

    text: bytes
    operands: Sequence[int]
    results: Sequence[int]
    stream: int
    device: int


def register(name: str, handle: Callable[[Call], None], platform: str = "CUDA") -> None:
    """Make ``handle`` the target ``name`` of ``jax.ffi.ffi_call``; what it raises becomes XLA's error."""

    on_gpu = platform == "CUDA"

    def enter(address: int) -> int | None:
        frame = _FRAME.unpack(ctypes.string_at(address, _FRAME.size))
        api, extension = frame[_API], frame[_EXTENSION]
        if extension and ctypes.c_int32.from_address(extension + _TYPE).value == _METADATA_EXTENSION:
            _describe(_word(extension + _METADATA), api)
            return None
        try:
            handle(_call(frame, on_gpu))
        except BaseException as error:  # nothing may leave through C
            return _error(api, str(error) or type(error).__name__)
        return None

    function = _Function(enter)
    _kept.append(function)
    jax.ffi.register_ffi_target(name, _pycapsule(function), platform=platform, api_version=1)


def _call(frame: tuple[int, ...], on_gpu: bool) -> Call:
    api, context = frame[_API], frame[_CONTEXT]
    text, length = _words(_word(frame[_ATTRIBUTES]), 2)
    return Call(
        ctypes.string_at(text, length),
        _addresses(frame, *_ARGUMENTS),
        _addresses(frame, *_RESULTS),
        _ask(_function(api + _STREAM_GET), context) if on_gpu else 0,
        _ask(_function(api + _DEVICE_GET), context) & 0xFFFFFFFF if on_gpu else 0,
    )


def _addresses(frame: tuple[int, ...], count: int, pointers: int) -> list[int]:
    return [_word(buffer + _DATA) for buffer in _words(frame[pointers], frame[count])]


@functools.cache
def _function(address: int) -> Any:
    """The function of the API whose pointer is there."""
    return _Function(_word(address))


def _ask(function: Any, context: int) -> int:
    """What a function of the API answers for a context: arguments are (size, extension, context, answer)."""
    arguments = (ctypes.c_uint64 * 4)(32, 0, context, 0)
    if function(ctypes.addressof(arguments)):
        raise RuntimeError("XLA does not tell the stream or the device of a call.")
    return int(arguments[3])


def _error(api: int, message: str) -> int | None:
    """An XLA_FFI_Error: arguments are (size, extension, message, code)."""
    text = ctypes.create_string_buffer(message.encode())
    arguments = (ctypes.c_uint64 * 4)(32, 0, ctypes.addressof(text), _INTERNAL)
    created: int | None = _function(api + _ERROR_CREATE)(ctypes.addressof(arguments))
    return created


def _describe(metadata: int, api: int) -> None:
    version = ctypes.string_at(api + _API_VERSION, 8)
    ctypes.memmove(metadata + _VERSION, version, 8)
    ctypes.memmove(metadata + _TRAITS, struct.pack("=I", _COMMAND_BUFFER_COMPATIBLE), 4)


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def _words(address: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"={count}Q", ctypes.string_at(address, 8 * count))
