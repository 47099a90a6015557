"""CUtensorMap: what the copy engine knows of a matrix in global memory (CUDA driver API, cuTensorMapEncodeTiled)."""

from __future__ import annotations

import ctypes

from marlin_cupy.jit.launch import driver_library

_TYPES = {"float16": 6, "bfloat16": 9}  # CU_TENSOR_MAP_DATA_TYPE_*
_SWIZZLE_128B = 3
_L2_PROMOTION_256B = 3
_BYTES = 128
_ALIGNMENT = 64


def of_matrix(pointer: int, dtype: str, shape: tuple[int, int], stride: int, box: tuple[int, int]) -> bytes:
    """The encoded map of a row-major matrix, read in boxes with the 128-byte swizzle; zeros beyond its edges.

    Args:
        pointer: device address, a multiple of 16.
        dtype: "float16" or "bfloat16".
        shape: rows, columns.
        stride: elements between rows, a multiple of 8 (of no account for one row).
        box: rows (at most 256) and columns (at most 64) of a copy.
    """
    rows, columns = shape
    storage = ctypes.create_string_buffer(_BYTES + _ALIGNMENT)
    address = -(-ctypes.addressof(storage) // _ALIGNMENT) * _ALIGNMENT
    sizes = (ctypes.c_uint64 * 2)(columns, rows)
    strides = (ctypes.c_uint64 * 1)(2 * (stride if rows > 1 else -(-columns // 8) * 8))
    boxes = (ctypes.c_uint32 * 2)(box[1], box[0])
    steps = (ctypes.c_uint32 * 2)(1, 1)
    code = driver_library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address),
        _TYPES[dtype],
        2,
        ctypes.c_void_p(pointer),
        sizes,
        strides,
        boxes,
        steps,
        0,
        _SWIZZLE_128B,
        _L2_PROMOTION_256B,
        0,
    )
    if code:
        raise RuntimeError(f"cuTensorMapEncodeTiled failed with CUresult {code} for {shape}, stride {stride}.")
    return ctypes.string_at(address, _BYTES)
