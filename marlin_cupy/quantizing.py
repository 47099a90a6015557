"""Quantize a dense weight; pack codes that exist; dequantize."""

from __future__ import annotations

from typing import Any

import numpy

from marlin_cupy import formats, frameworks
from marlin_cupy.device import Device, namespace, on
from marlin_cupy.errors import DeviceError
from marlin_cupy.packing import check_range, checked_weight, device_of, encode, moved
from marlin_cupy.scalars import E8M0
from marlin_cupy.spec import Spec
from marlin_cupy.tensor import QuantizedTensor

Array = Any  # an array of any library


def quantize(
    weight: Array,
    format: str = "int4",
    group_size: int | None = None,
    *,
    scale_dtype: str | None = None,
    search: str = "absmax",
    device: str | Device | None = None,
    **options: str,
) -> QuantizedTensor:
    """Quantize a weight by rounding to nearest.

    Args:
        weight: float16, bfloat16 or float32[K, N] of any library, any strides; ``y = x @ weight``.
            (PyTorch's Linear holds (N, K): pass ``linear.weight.T``.)
        format: a name of ``formats.names()``: "int4", "uint4", "int8", "nf4", "mxfp4", "int3", "int2", "fp8_e4m3".
        group_size: K per scale, -1 (all of K) or a multiple of 16; the format's default if None. "mxfp4" has 32.
        scale_dtype: "float16" or "bfloat16"; that of the weight if None, "float16" for float32. Scales of "mxfp4" are
            powers of two ("float8_e8m0fnu"). Those of "fp8_e4m3" can be that or "float32" too, and with group_size=-1
            they are float32.
        search: "absmax", or "mse" for the clip that minimises the squared error of each group.
        device: where the result goes, "cpu" or "cuda[:N]"; where the weight is if None.
        options: of the format. "fp8_e4m3" has ``scale="block"``: blocks of 128 x 128 share a scale (group_size=128).

    Returns:
        A QuantizedTensor over a NumPy array (host) or a CuPy array (GPU).

    Raises:
        TypeError: ``weight`` is no array. ValueError: wrong rank, dtype, group size, format or search,
            non-finite weights, scales too large or too small for ``scale_dtype``. DeviceError: no such device.
            MissingDependencyError: a GPU was asked for and CuPy is not installed.
    """
    formats.get(format)  # says what there is before anything is computed
    framework, native, dtype, largest = checked_weight(weight, search)
    spec = Spec.checked(format, tuple(native.shape), group_size, scale_dtype, options, like=dtype)
    check_range(spec, largest)
    if device is not None and Device.parse(device) != device_of(native):
        native = moved(native, Device.parse(device))
    xp = namespace(native)
    with on(device_of(native)):
        parts = {name: xp.zeros(part.shape, part.dtype) for name, part in spec.parts.items() if not part.derived}
        encode(native, spec, search, **parts)
        framework.settle(native)
    return QuantizedTensor(spec, **parts)


def pack(
    codes: Array,
    scales: Array,
    zero_points: Array | None = None,
    *,
    format: str = "int4",
    group_size: int,
) -> QuantizedTensor:
    """A QuantizedTensor from codes and parameters that exist already (a checkpoint, another quantizer).

    Args:
        codes: uint8[K, N], as the format defines them (int4: 0 to 15, standing for -8 to 7). Of "fp8_e4m3" also
            float8_e4m3fn.
        scales: float16 or bfloat16[groups, N], groups = ceil(K / group_size), or 1 for -1. Of "mxfp4" uint8, the
            biased exponents. Of "fp8_e4m3" also float32, as they must be with group_size=-1.
        zero_points: integers of any numeric dtype [groups, N], for formats that have them.
        format, group_size: as in :func:`quantize`.

    Raises:
        TypeError, ValueError: as :func:`quantize`, and for codes or zero points out of range.
    """
    definition = formats.get(format)
    named = {"codes": codes, formats.SCALE: scales}
    if (zero_points is not None) != (formats.ZERO_POINT in definition.params):
        needs = "needs" if zero_points is None else "has no"
        raise ValueError(f"format {format!r} {needs} zero_points.")
    if zero_points is not None:
        named[formats.ZERO_POINT] = zero_points
    resolved = {name: frameworks.resolve(array, name) for name, array in named.items()}
    native = {name: framework.to_native(array) for name, (framework, array) in resolved.items()}
    devices = {name: device_of(array) for name, array in native.items()}
    if len(set(devices.values())) != 1:
        places = ", ".join(f"{name}: {device}" for name, device in devices.items())
        raise DeviceError(f"the arrays are on different devices ({places}); put them on one.")
    if native["codes"].dtype.name == definition.codes_as:
        native["codes"] = native["codes"].view(numpy.uint8)
    if native["codes"].ndim != 2 or native["codes"].dtype != numpy.uint8 or 0 in native["codes"].shape:
        dtypes = " or ".join(dict.fromkeys(("uint8", definition.codes_as)))
        raise ValueError(f"codes are {native['codes'].dtype}{native['codes'].shape}; pass {dtypes} (K, N), not empty.")
    spec = Spec.checked(format, tuple(native["codes"].shape), group_size, _scale_dtype(native[formats.SCALE], format))
    scale = spec.layout.scale
    groups = (spec.layout.groups, spec.shape[1])
    for name in definition.params:
        if native[name].shape != groups:
            raise ValueError(f"{name}s have shape {native[name].shape}; group_size {group_size} needs {groups}.")
    with on(devices["codes"]):
        definition.check_codes(native["codes"])
        xp = namespace(native["codes"])
        bits = xp.ascontiguousarray(native[formats.SCALE]).view(scale.stored_as)
        params = {formats.SCALE: scale.from_bits(bits)}
        if not bool(xp.isfinite(params[formats.SCALE]).all()):
            raise ValueError("scales contain NaN or infinity.")
        if formats.ZERO_POINT in native:
            points = native[formats.ZERO_POINT].astype(xp.float32)
            if bool(((points < 0) | (points > definition.max_code) | (points != xp.rint(points))).any()):
                raise ValueError(f"zero_points must be integers from 0 to {definition.max_code}.")
            params[formats.ZERO_POINT] = points
        parts = {"packed": spec.layout.pack(native["codes"], params)}
        if definition.has_output_scales(group_size):
            parts["output_scales"] = xp.zeros(spec.parts["output_scales"].shape, dtype=xp.float32)
            parts["output_scales"][: spec.shape[1]] = params[formats.SCALE][0]
        for name, (framework, _) in resolved.items():
            framework.settle(native[name])
        return QuantizedTensor(spec, **parts)


def _scale_dtype(scales: Any, format: str) -> str:
    """The type of an array of scales; bytes are the bits of 8-bit scales."""
    name = str(scales.dtype.name)
    return E8M0.name if name == E8M0.stored_as and E8M0 in formats.get(format).scale_dtypes else name


def dequantize(w: QuantizedTensor, dtype: str | None = None) -> Array:
    """The matrix (K, N) that ``w`` stands for; see :meth:`QuantizedTensor.dequantize`."""
    if not isinstance(w, QuantizedTensor):
        raise TypeError(f"w is a {type(w).__name__}; pass a QuantizedTensor.")
    return w.dequantize(dtype)
