"""QuantizedTensor: a format, a logical shape and one packed buffer."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy
import safetensors.numpy

from marlin_cupy import formats, frameworks, writes
from marlin_cupy.device import CPU, Device, namespace, on
from marlin_cupy.errors import DeviceError, UnsupportedError
from marlin_cupy.files import METADATA_KEY, described, whole_file
from marlin_cupy.layout import SLAB_N
from marlin_cupy.packing import (
    NUMPY_DTYPES,
    check_range,
    checked_weight,
    column_blocks,
    decoded,
    device_of,
    encode,
    moved,
)
from marlin_cupy.scalars import by_name
from marlin_cupy.spec import Spec

Array = Any  # an array of any library

#: Attributes of a QuantizedTensor that are known when its arrays hold values.
_OF_PLACE = ("_native", "_factors", "device", "pointer", "factors_pointer", "writes")


class Unpacked(NamedTuple):
    """What :meth:`QuantizedTensor.unpack` returns and :func:`pack` takes.

    Attributes:
        codes: uint8[K, N], as the format defines them (int4: 0 to 15, standing for -8 to 7).
        scales: float16 or bfloat16[groups, N].
        zero_points: the same dtype, integer values, [groups, N]; None for formats without them.
    """

    codes: Array
    scales: Array
    zero_points: Array | None


class QuantizedTensor:
    """A weight matrix W (K, N) in packed form, for ``y = x @ W``.

    Made by :func:`quantize`, :func:`pack` and :func:`load`. ``packed`` is a uint8 array
    (ceil(N/64), ceil(K/128), slab_bytes) of any library, see ``layout.py``.
    """

    # Without __slots__, which torch.compile of PyTorch 2.4 cannot look into.

    _native: Any
    _factors: Any
    device: Device
    pointer: int
    factors_pointer: int
    writes: writes.Writes
    #: On a GPU, and in JAX: float32 per output in the library of ``packed``, see Layout.range_factors. Tensors over the
    #: same memory share it.
    range_factors: Array | None

    #: For kernels, which can take one weight out of several: see kernels.operands.Weight.
    layer_pointer: ClassVar[int] = 0

    # NumPy and CuPy leave ``x @ w`` to __rmatmul__ when they see these.
    __array_ufunc__ = None
    __array_priority__ = 1000

    #: matmul, set by ``api``, which is above this module.
    multiply: ClassVar[Callable[[Array, QuantizedTensor], Array]]

    def __init__(
        self, spec: Spec, packed: Array, *, output_scales: Array | None = None, range_factors: Array | None = None
    ) -> None:
        range_factors = output_scales if range_factors is None else range_factors
        framework, packed = frameworks.resolve(packed, "packed")
        layout = spec.layout
        if tuple(packed.shape) != layout.packed_shape or framework.dtype(packed) != "uint8":
            raise ValueError(
                f"packed is {framework.dtype(packed)}{tuple(packed.shape)}; a {spec.format} weight of (K, N) = "
                f"{spec.shape}, group_size={spec.group_size} needs uint8{layout.packed_shape}."
            )
        if range_factors is not None:
            range_factors = framework.from_native(_native(range_factors, "range_factors"))
        self._describe(spec, packed, range_factors)
        self._place()
        if self.range_factors is None and (self.device != CPU or framework.takes_apart):
            with on(self.device):
                self._factors = layout.range_factors(self._native)
            self.range_factors = framework.from_native(self._factors)
            self._place_factors(self.range_factors)
            self.writes.mark()
        frameworks.meet(QuantizedTensor)

    def _describe(self, spec: Spec, packed: Array, range_factors: Array | None, layer: Array | None = None) -> None:
        """What is known of any ``packed``, also of one that holds no values yet."""
        self.packed = packed
        self.range_factors = range_factors
        #: Which weight of a stack this is, where ``packed`` (layers, ...) is one: an integer array.
        self.layer = layer
        #: The spec of which ``spec`` is a share, inside jax.shard_map; elsewhere the same.
        self.whole = spec
        self.spec = spec
        if len(getattr(packed, "shape", ())) >= 3:
            with contextlib.suppress(ValueError):  # who computes with it says so
                self.spec = spec.of_part(tuple(packed.shape))
        self.layout = self.spec.layout

    def _place(self) -> None:
        """Where it is; ValueError, TypeError or UnsupportedError for what is no array of values on one device."""
        framework = frameworks.of(self.packed)
        packed, factors = self.packed, self.range_factors
        if self.layer is not None:  # a copy of it: only kernels launched by a compiled program read it in place
            packed, factors = packed[self.layer], None if factors is None else factors[self.layer]
        if tuple(packed.shape) != self.layout.packed_shape:
            raise ValueError(
                f"packed has shape {tuple(packed.shape)} and one {self.format} weight of (K, N) = {self.shape} "
                f"{self.layout.packed_shape}; a stack of weights is indexed, w[i], before it is used."
            )
        self.device = framework.device(packed)
        native = framework.to_native(packed)
        if not native.flags.c_contiguous:
            raise ValueError(f"packed has strides {native.strides}; it must be C-contiguous.")
        self._native = native
        self.pointer, self.factors_pointer = 0, 0
        self.writes = writes.Writes() if self.device == CPU else writes.of_gpu(self.device.index)
        if self.device != CPU:
            self.pointer = int(native.data.ptr)
        self._place_factors(factors)
        self.writes.mark()  # packed may have been filled a moment ago

    def _place_factors(self, factors: Array | None) -> None:
        self._factors = None if factors is None else frameworks.of(factors).to_native(factors)
        if self.device != CPU and self._factors is not None:
            self.factors_pointer = int(self._factors.data.ptr)

    def __getattr__(self, name: str) -> Any:
        """What :meth:`_place` finds, for a tensor that was put together by :meth:`of_parts`."""
        if name not in _OF_PLACE:
            raise AttributeError(f"a QuantizedTensor has no {name!r}.")
        self._place()
        return object.__getattribute__(self, name)

    @property
    def parts(self) -> tuple[Array, Array | None, Array | None]:
        """The arrays that it consists of, for libraries that take trees of arrays apart: see :meth:`of_parts`."""
        return self.packed, self.range_factors, self.layer

    @staticmethod
    def of_parts(spec: Spec, parts: Iterable[Any]) -> QuantizedTensor:
        """Put together what was taken apart into ``whole`` and :attr:`parts`, whatever has become of these.

        They may be traced, shares of the arrays, stacks of them, or no arrays at all: nothing is looked at before it is
        used.
        """
        found = object.__new__(QuantizedTensor)
        found._describe(spec, *parts)
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """Logical shape (K, N)."""
        return self.spec.shape

    @property
    def format(self) -> str:
        """Name of the weight format."""
        return self.spec.format

    @property
    def group_size(self) -> int:
        """K per scale; -1: one scale per output column."""
        return self.spec.group_size

    @property
    def scale_dtype(self) -> str:
        """ "float16" or "bfloat16"."""
        return self.spec.scale_dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the packed buffer, scales and padding included."""
        return math.prod(self.layout.packed_shape)

    def __repr__(self) -> str:
        try:
            where = f"device={self.device}, nbytes={self.nbytes}"
        except (TypeError, ValueError, UnsupportedError, DeviceError):  # traced, spread over devices, a stack
            where = f"packed={getattr(self.packed, 'dtype', type(self.packed).__name__)}"
            where += f"{getattr(self.packed, 'shape', '')}"
        return (
            f"QuantizedTensor({self.format}, K={self.shape[0]}, N={self.shape[1]}, group_size={self.group_size}, "
            f"scale_dtype={self.scale_dtype}, {where})"
        )

    def __getitem__(self, layer: Any) -> QuantizedTensor:
        """One weight of a stack, in place: ``layer`` may be traced, as in jax.lax.scan; see integrations.jax.stack."""
        if self.layer is not None or len(self.packed.shape) != 1 + len(self.layout.packed_shape):
            raise TypeError(f"{self!r} is one weight; only a stack of weights can be indexed.")
        return QuantizedTensor.of_parts(self.whole, (self.packed, self.range_factors, layer))

    def __rmatmul__(self, x: Array) -> Array:
        return QuantizedTensor.multiply(x, self)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        # PyTorch asks this before __rmatmul__, and torch.compile, which traces ``x @ w`` no other way, instead of it.
        return cls.multiply(*args) if function.__name__ == "matmul" and not kwargs else NotImplemented

    def unpack(self) -> Unpacked:
        """Logical codes and parameters as NumPy or CuPy arrays: the exact inverse of :func:`pack`."""
        with on(self.device):
            codes, bits = self.layout.unpack(self._native, self.shape[1])
        if formats.SCALE not in bits:
            bits[formats.SCALE] = self._factors[None, : self.shape[1]]
        dtype = NUMPY_DTYPES.get(self.scale_dtype, numpy.uint8)
        zero_points = bits.get(formats.ZERO_POINT)
        return Unpacked(
            codes, bits[formats.SCALE].view(dtype), None if zero_points is None else zero_points.view(dtype)
        )

    def dequantize(self, dtype: str | None = None) -> Array:
        """W (K, N) in ``dtype`` ("float16", "bfloat16", "float32"; default: that of the scales).

        The result is in the library and on the device of ``packed``.
        """
        dtype = dtype or self.spec.dense_dtype
        if dtype not in NUMPY_DTYPES:
            raise ValueError(f"dtype is {dtype!r}; use one of {', '.join(NUMPY_DTYPES)}.")
        xp = namespace(self._native)
        with on(self.device):
            result = xp.empty(self.shape, dtype=NUMPY_DTYPES[dtype])
            for columns, values in self.blocks():
                scalar = by_name(dtype)
                result.view(scalar.stored_as)[:, columns] = scalar.to_bits(values)
        return frameworks.of(self.packed).from_native(result)

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """The dequantized matrix a run of columns at a time: (columns, native float32[K, columns])."""
        for columns in column_blocks(self.shape, self.device):
            with on(self.device):
                packed = self._native[columns.start // SLAB_N : -(-columns.stop // SLAB_N)]
                scales = None if self._factors is None else self._factors[columns]
                values = decoded(self.layout, packed, columns.stop - columns.start, scales)
            yield columns, values

    def to(self, where: str | Device) -> QuantizedTensor:
        """The same weight in another library or on another device.

        Args:
            where: "numpy", "cupy", "torch" or "jax" (shares memory where both are on the same device;
                JAX on the CPU copies), or "cpu", "cuda", "cuda:N" (copies, as a NumPy or CuPy array).
        """
        if isinstance(where, str) and where in frameworks.NAMES:
            native = self._native
            if where == "numpy" and self.device != CPU:
                native = moved(native, CPU)
            elif where == "cupy" and self.device == CPU:
                return self.to("cuda")
            factors = None if where == "numpy" else self._factors
            return QuantizedTensor(self.spec, frameworks.by_name(where).from_native(native), range_factors=factors)
        try:
            device = Device.parse(where)
        except ValueError:
            raise ValueError(
                f"where is {where!r}; use a library ({', '.join(frameworks.NAMES)}) "
                'or a device ("cpu", "cuda", "cuda:N").'
            ) from None
        if device == self.device:
            return QuantizedTensor(self.spec, self._native, range_factors=self._factors)
        factors = None
        if device != CPU:  # computed here, where that needs no kernel to be compiled
            factors = self.layout.range_factors(self._native) if self.device == CPU else self._factors
            factors = moved(factors, device)
        return QuantizedTensor(self.spec, moved(self._native, device), range_factors=factors)

    def columns(self, start: int, stop: int) -> QuantizedTensor:
        """The weight of outputs ``start`` to ``stop``, W[:, start:stop], in memory of its own.

        Args:
            start, stop: multiples of 64; ``stop`` may be N.

        Raises:
            ValueError: any other numbers.
        """
        return self._cut(slice(None), slice(start, stop))

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """The weight of inputs ``start`` to ``stop``, W[start:stop], in memory of its own.

        Args:
            start, stop: multiples of 128 and of the group size (of 128 where one group is all of K); ``stop`` may be K.

        Raises:
            ValueError: any other numbers.
        """
        return self._cut(slice(start, stop), slice(None))

    def shard(self, axis: int, index: int, count: int) -> QuantizedTensor:
        """One of ``count`` equal parts along K or N, for devices that share a product.

        Args:
            axis: of the logical shape. 0 cuts K: each part takes its part of x, and the products are to be added up.
                1 cuts N: the products stand side by side.
            index: which part, from 0.
            count: of parts.

        Raises:
            ValueError: no such axis or part, or parts that would not end where :meth:`rows` or :meth:`columns` can cut;
                the message says into how many they can.
        """
        if axis not in (0, 1):
            raise ValueError(f"axis is {axis!r}; 0 cuts K and 1 cuts N.")
        if not 0 <= index < count:
            raise ValueError(f"index is {index!r} of {count!r} parts; use 0 to count - 1.")
        part = self.spec.equal_part(axis, count)
        return (self.rows, self.columns)[axis](index * part, (index + 1) * part)

    def _cut(self, rows: slice, columns: slice) -> QuantizedTensor:
        spec, slabs = self.spec.cut(rows, columns)
        with on(self.device):
            packed = self._native[slabs].copy()
        return QuantizedTensor(spec, frameworks.of(self.packed).from_native(packed))

    def update_(self, weight: Array, search: str = "absmax") -> QuantizedTensor:
        """Re-quantize ``weight`` (K, N) into the same memory, so that pointers held elsewhere stay valid.

        ``weight`` is checked completely before anything is written. Returns self.
        """
        frameworks.of(self.packed).refuse_writing(self.packed, "update_ writes in place, and packed")
        framework, native, _, largest = checked_weight(weight, search)
        check_range(self.spec, largest)
        if tuple(native.shape) != self.shape:
            raise ValueError(f"weight has shape {tuple(native.shape)}; this tensor holds {self.shape}.")
        device = device_of(native)
        if device != self.device:
            raise DeviceError(f"weight is on {device} and the packed buffer on {self.device}; move one of them.")
        with self.writes.writing():
            encode(native, self.spec, search, self._native)
            self._refresh_factors()
        framework.settle(native)
        return self

    def mark_written(self) -> None:
        """Say that something other than marlin_cupy has written into ``packed``, before the next :func:`matmul`.

        Call it when the kernel that writes has been enqueued and, where that was on another stream than the
        multiplication, or on a branch of a graph that is being captured, when the streams have been joined. The next
        multiplication on each stream of this GPU is then a plain launch; see ``dependent`` of :func:`matmul`. What is
        kept of the scales is read anew, on CuPy's current stream.
        """
        with self.writes.writing():
            self._refresh_factors()

    def _refresh_factors(self) -> None:
        """In the same memory, since launches in graphs read it."""
        if self._factors is not None:
            with on(self.device):
                self._factors[...] = self.layout.range_factors(self._native)

    def __reduce__(self) -> tuple[Callable[..., QuantizedTensor], tuple[Any, ...]]:
        # Copies and pickles are made anew: an address and loaded kernels do not travel.
        if "_native" in self.__dict__:
            return QuantizedTensor, (self.spec, self.packed)
        return _copied, (self.whole, self.parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with one uint8 tensor "packed" and the description as metadata.

        The file appears whole or not at all.
        """
        path = Path(path)
        packed = numpy.ascontiguousarray(self._native if self.device == CPU else moved(self._native, CPU))
        metadata = {METADATA_KEY: json.dumps(described(self.spec, packed), sort_keys=True)}
        with whole_file(path) as temporary:
            safetensors.numpy.save_file({"packed": packed}, temporary, metadata=metadata)


def _copied(whole: Spec, parts: tuple[Array, Array | None, Array | None]) -> QuantizedTensor:
    """A copy of what :meth:`QuantizedTensor.of_parts` put together: a stack, or traced, or spread over devices."""
    frameworks.meet(QuantizedTensor)
    return QuantizedTensor.of_parts(whole, parts)


def _native(array: Array, role: str) -> Any:
    framework, array = frameworks.resolve(array, role)
    return framework.to_native(array)
