"""QuantizedTensor: a format, a logical shape and one packed buffer; quantize, dequantize, save and load."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy
import safetensors
import safetensors.numpy

from marlin_cupy import formats, frameworks, writes
from marlin_cupy.device import CPU, Device, gpu, gpu_count, import_cupy, namespace, on
from marlin_cupy.errors import DeviceError, FileFormatError, UnsupportedError
from marlin_cupy.files import METADATA_KEY, check_packed, check_shape, described, readable, whole_file
from marlin_cupy.formats.scalars import BFLOAT16, FLOAT16, FLOAT32, HALF_DTYPES, MAX, from_bits, to_bits
from marlin_cupy.frameworks import Framework
from marlin_cupy.layout import SLAB_N, Layout
from marlin_cupy.spec import Spec, checked_group_size, checked_scale_dtype

Array = Any  # an array of any library

_SEARCHES = ("absmax", "mse")
#: Weights handled at once while quantizing and dequantizing: bounds scratch to a few times 4 bytes each.
_BLOCK_WEIGHTS = {"cpu": 4 << 20, "cuda": 16 << 20}
#: Attributes of a QuantizedTensor that are known when its arrays hold values.
_OF_PLACE = ("_native", "_factors", "device", "pointer", "factors_pointer", "writes")
#: Below this float16 is subnormal with fewer significant bits than bfloat16.
_COARSE_FLOAT16 = 2.0**-16
_NUMPY_DTYPES = {
    FLOAT16: numpy.dtype(numpy.float16),
    BFLOAT16: numpy.dtype(ml_dtypes.bfloat16),
    FLOAT32: numpy.dtype(numpy.float32),
}


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

    #: For kernels, which can take one weight out of several: see kernels.operands.Stack.
    stack: ClassVar[tuple[int, int]] = (0, 1)

    # NumPy and CuPy leave ``x @ w`` to __rmatmul__ when they see these.
    __array_ufunc__ = None
    __array_priority__ = 1000

    #: matmul, set by ``api``, which is above this module.
    multiply: ClassVar[Callable[[Array, QuantizedTensor], Array]]

    def __init__(self, spec: Spec, packed: Array, *, range_factors: Array | None = None) -> None:
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
        self.plans: dict[Any, Any] = {}  # launches by (M, dtype), kept by the kernels

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
        dtype = _NUMPY_DTYPES[self.scale_dtype]
        zero_points = bits.get(formats.ZERO_POINT)
        return Unpacked(
            codes, bits[formats.SCALE].view(dtype), None if zero_points is None else zero_points.view(dtype)
        )

    def dequantize(self, dtype: str | None = None) -> Array:
        """W (K, N) in ``dtype`` ("float16", "bfloat16", "float32"; default: that of the scales).

        The result is in the library and on the device of ``packed``.
        """
        dtype = dtype or self.scale_dtype
        if dtype not in _NUMPY_DTYPES:
            raise ValueError(f"dtype is {dtype!r}; use one of {', '.join(_NUMPY_DTYPES)}.")
        xp = namespace(self._native)
        with on(self.device):
            result = xp.empty(self.shape, dtype=_NUMPY_DTYPES[dtype])
            for columns, values in self.blocks():
                if dtype == FLOAT32:
                    result[:, columns] = values
                else:
                    result.view(xp.uint16)[:, columns] = to_bits(values, dtype)
        return frameworks.of(self.packed).from_native(result)

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """The dequantized matrix a run of columns at a time: (columns, native float32[K, columns])."""
        for columns in _column_blocks(self.shape, self.device):
            with on(self.device):
                packed = self._native[columns.start // SLAB_N : -(-columns.stop // SLAB_N)]
                values = decoded(self.layout, packed, columns.stop - columns.start)
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
                native = _moved(native, CPU)
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
            factors = _moved(factors, device)
        return QuantizedTensor(self.spec, _moved(self._native, device), range_factors=factors)

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
        framework, native, _, largest = _checked_weight(weight, search)
        _check_range(self.spec, largest)
        if tuple(native.shape) != self.shape:
            raise ValueError(f"weight has shape {tuple(native.shape)}; this tensor holds {self.shape}.")
        device = _device_of(native)
        if device != self.device:
            raise DeviceError(f"weight is on {device} and the packed buffer on {self.device}; move one of them.")
        with self.writes.writing():
            _encode(native, self.spec, search, self._native)
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
        packed = numpy.ascontiguousarray(self._native if self.device == CPU else _moved(self._native, CPU))
        metadata = {METADATA_KEY: json.dumps(described(self.spec, packed), sort_keys=True)}
        with whole_file(path) as temporary:
            safetensors.numpy.save_file({"packed": packed}, temporary, metadata=metadata)


def quantize(
    weight: Array,
    format: str = "int4",
    group_size: int | None = None,
    *,
    scale_dtype: str | None = None,
    search: str = "absmax",
    device: str | Device | None = None,
) -> QuantizedTensor:
    """Quantize a weight by rounding to nearest.

    Args:
        weight: float16, bfloat16 or float32[K, N] of any library, any strides; ``y = x @ weight``.
            (PyTorch's Linear holds (N, K): pass ``linear.weight.T``.)
        format: a name of ``formats.names()``: "int4", "uint4", "int8", "nf4".
        group_size: K per scale, -1 (all of K) or a multiple of 16; the format's default if None.
        scale_dtype: "float16" or "bfloat16"; that of the weight if None, "float16" for float32.
        search: "absmax", or "mse" for the clip that minimises the squared error of each group.
        device: where the result goes, "cpu" or "cuda[:N]"; where the weight is if None.

    Returns:
        A QuantizedTensor over a NumPy array (host) or a CuPy array (GPU).

    Raises:
        TypeError: ``weight`` is no array. ValueError: wrong rank, dtype, group size, format or search,
            non-finite weights, scales too large or too small for ``scale_dtype``. DeviceError: no such device.
            MissingDependencyError: a GPU was asked for and CuPy is not installed.
    """
    group_size = checked_group_size(group_size, formats.get(format).default_group_size)
    framework, native, dtype, largest = _checked_weight(weight, search)
    if scale_dtype is None:
        scale_dtype = dtype if dtype in HALF_DTYPES else FLOAT16
    spec = Spec(format, tuple(native.shape), group_size, checked_scale_dtype(scale_dtype))
    _check_range(spec, largest)
    if device is not None and Device.parse(device) != _device_of(native):
        native = _moved(native, Device.parse(device))
    xp = namespace(native)
    with on(_device_of(native)):
        packed = xp.empty(spec.layout.packed_shape, dtype=xp.uint8)
        _encode(native, spec, search, packed)
        framework.settle(native)
    return QuantizedTensor(spec, packed)


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
        codes: uint8[K, N], as the format defines them (int4: 0 to 15, standing for -8 to 7).
        scales: float16 or bfloat16[groups, N], groups = ceil(K / group_size), or 1 for -1.
        zero_points: integers of any numeric dtype [groups, N], for formats that have them.
        format, group_size: as in :func:`quantize`.

    Raises:
        TypeError, ValueError: as :func:`quantize`, and for codes or zero points out of range.
    """
    definition = formats.get(format)
    group_size = checked_group_size(group_size, definition.default_group_size)
    named = {"codes": codes, formats.SCALE: scales}
    if (zero_points is not None) != (formats.ZERO_POINT in definition.params):
        needs = "needs" if zero_points is None else "has no"
        raise ValueError(f"format {format!r} {needs} zero_points.")
    if zero_points is not None:
        named[formats.ZERO_POINT] = zero_points
    resolved = {name: frameworks.resolve(array, name) for name, array in named.items()}
    native = {name: framework.to_native(array) for name, (framework, array) in resolved.items()}
    devices = {name: _device_of(array) for name, array in native.items()}
    if len(set(devices.values())) != 1:
        places = ", ".join(f"{name}: {device}" for name, device in devices.items())
        raise DeviceError(f"the arrays are on different devices ({places}); put them on one.")
    if native["codes"].ndim != 2 or native["codes"].dtype != numpy.uint8 or 0 in native["codes"].shape:
        raise ValueError(f"codes are {native['codes'].dtype}{native['codes'].shape}; pass uint8 (K, N), not empty.")
    scale_dtype = checked_scale_dtype(native[formats.SCALE].dtype.name)
    spec = Spec(format, tuple(native["codes"].shape), group_size, scale_dtype)
    groups = (spec.layout.groups, spec.shape[1])
    for name in definition.params:
        if native[name].shape != groups:
            raise ValueError(f"{name}s have shape {native[name].shape}; group_size {group_size} needs {groups}.")
    with on(devices["codes"]):
        if int(native["codes"].max()) > definition.max_code:
            raise ValueError(f"the largest code is {int(native['codes'].max())}; {format} has {definition.bits} bits.")
        xp = namespace(native["codes"])
        params = {formats.SCALE: from_bits(xp.ascontiguousarray(native[formats.SCALE]).view(xp.uint16), scale_dtype)}
        if not bool(xp.isfinite(params[formats.SCALE]).all()):
            raise ValueError("scales contain NaN or infinity.")
        if formats.ZERO_POINT in native:
            points = native[formats.ZERO_POINT].astype(xp.float32)
            if bool(((points < 0) | (points > definition.max_code) | (points != xp.rint(points))).any()):
                raise ValueError(f"zero_points must be integers from 0 to {definition.max_code}.")
            params[formats.ZERO_POINT] = points
        packed = spec.layout.pack(native["codes"], params)
        for name, (framework, _) in resolved.items():
            framework.settle(native[name])
        return QuantizedTensor(spec, packed)


def dequantize(w: QuantizedTensor, dtype: str | None = None) -> Array:
    """The matrix (K, N) that ``w`` stands for; see :meth:`QuantizedTensor.dequantize`."""
    if not isinstance(w, QuantizedTensor):
        raise TypeError(f"w is a {type(w).__name__}; pass a QuantizedTensor.")
    return w.dequantize(dtype)


def load(
    path: str | os.PathLike[str],
    device: str | Device = "cpu",
    *,
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> QuantizedTensor:
    """Read a file that :meth:`QuantizedTensor.save` wrote, checking every byte of it, or a part W[rows, columns].

    Of a part nothing else is read, so that its bytes are not checked: the checksum is of all.

    Args:
        path: the file.
        device: "cpu" (a NumPy array) or "cuda[:N]" (a CuPy array).
        rows, columns: where :meth:`QuantizedTensor.rows` and :meth:`QuantizedTensor.columns` can cut.

    Raises:
        FileNotFoundError: no such file. FileFormatError: not such a file, truncated, edited, of an unknown format
            or of a future version. ValueError: no such part. DeviceError: no such device. MissingDependencyError: a GPU
            was asked for and CuPy is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}.")
    with readable(path), safetensors.safe_open(path, framework="numpy") as file:
        metadata, names = file.metadata() or {}, list(file.keys())
        stored = file.get_slice("packed") if "packed" in names else None
    if METADATA_KEY not in metadata or stored is None:
        raise FileFormatError(f"{path} holds no marlin_cupy weight; QuantizedTensor.save writes such files.")
    try:
        found = json.loads(metadata[METADATA_KEY])
    except ValueError as error:
        raise FileFormatError(f"{path} has damaged metadata ({error!r}); save it again.") from error
    spec = Spec.of_fields(found, path)
    check_shape(spec, tuple(stored.get_shape()), stored.get_dtype(), path)
    part, slabs = spec.cut(rows, columns)
    with readable(path):
        packed = stored[slabs]
    if part == spec:
        check_packed(found, spec, packed, path)
    return QuantizedTensor(part, packed).to(Device.parse(device))


def _copied(whole: Spec, parts: tuple[Array, Array | None, Array | None]) -> QuantizedTensor:
    """A copy of what :meth:`QuantizedTensor.of_parts` put together: a stack, or traced, or spread over devices."""
    frameworks.meet(QuantizedTensor)
    return QuantizedTensor.of_parts(whole, parts)


def _encode(weight: Any, spec: Spec, search: str, packed: Any) -> None:
    """Quantize a checked native ``weight`` into ``packed``, a run of columns at a time."""
    format, layout = formats.get(spec.format), spec.layout
    with on(_device_of(packed)):
        for columns in _column_blocks(spec.shape, _device_of(packed)):
            grouped = _grouped(_as_float32(weight[:, columns]), layout, 0)
            codes, params = format.quantize(grouped, spec.scale_dtype, search)
            codes = codes.reshape(-1, codes.shape[-1])[: spec.shape[0]]
            packed[columns.start // SLAB_N : -(-columns.stop // SLAB_N)] = layout.pack(codes, params)


def decoded(layout: Layout, packed: Any, n: int) -> Any:
    """The float32 matrix (K, n) that a run of whole 64-column blocks stands for; NumPy, CuPy or JAX arrays.

    Args:
        layout: of the weight that the blocks are from.
        packed: uint8 (slabs_n, slabs_k, slab_bytes).
        n: logical number of columns in them.
    """
    codes, bits = layout.unpack(packed, n)
    params = {name: from_bits(value, layout.scale_dtype) for name, value in bits.items()}
    values = layout.format.decode(_grouped(codes, layout, layout.format.zero_code), params)
    return values.reshape(-1, n)[: layout.K]


def _grouped(columns: Any, layout: Layout, fill: int) -> Any:
    """(K, n) -> (groups, group_size, n), the last group filled up."""
    xp = namespace(columns)
    size = layout.K if layout.groups == 1 else layout.group_size
    missing = layout.groups * size - layout.K
    if missing:
        tail = xp.full((missing, columns.shape[1]), fill, dtype=columns.dtype)
        columns = xp.concatenate([columns, tail])
    return columns.reshape(layout.groups, size, columns.shape[1])


def _column_blocks(shape: tuple[int, int], device: Device) -> Iterator[slice]:
    """Runs of whole 64-column blocks that bound the scratch memory of a conversion."""
    step = max(1, _BLOCK_WEIGHTS[device.kind] // (shape[0] * SLAB_N)) * SLAB_N
    for start in range(0, shape[1], step):
        yield slice(start, min(start + step, shape[1]))


def _as_float32(values: Any) -> Any:
    """fp16, bf16 or fp32 as float32, without asking CuPy for bfloat16 arithmetic."""
    xp = namespace(values)
    if values.dtype.name == BFLOAT16:
        return from_bits(xp.ascontiguousarray(values).view(xp.uint16), BFLOAT16)
    return values.astype(xp.float32)


def _checked_weight(weight: Array, search: str) -> tuple[Framework, Any, str, float]:
    """The library of a weight, its native form, dtype and largest magnitude, or why it cannot be quantized."""
    if search not in _SEARCHES:
        raise ValueError(f"search is {search!r}; use one of {', '.join(_SEARCHES)}.")
    framework, weight = frameworks.resolve(weight, "weight")
    dtype = framework.dtype(weight)
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; pass (K, N), not empty.")
    if dtype not in _NUMPY_DTYPES:
        raise ValueError(f"weight is {dtype}; use float16, bfloat16 or float32.")
    native = framework.to_native(weight)
    device = _device_of(native)
    with on(device):
        xp = namespace(native)
        largest = 0.0
        for columns in _column_blocks(tuple(native.shape), device):
            block_largest = float(xp.max(xp.abs(_as_float32(native[:, columns]))))
            if not math.isfinite(block_largest):
                raise ValueError(
                    f"weight has NaN or infinity in columns {columns.start} to {columns.stop - 1}; "
                    "quantization needs finite weights."
                )
            largest = max(largest, block_largest)
    return framework, native, dtype, largest


def _check_range(spec: Spec, largest: float) -> None:
    """ValueError if the scale dtype cannot hold, or hardly holds, the scales of weights up to ``largest``."""
    extremes = numpy.asarray([[[largest], [-largest]]], dtype=numpy.float32)
    needed = float(formats.get(spec.format).fit(extremes, 1.0)[formats.SCALE].max())
    if needed > MAX[spec.scale_dtype]:
        raise ValueError(
            f"weights up to {largest:.3g} need scales up to {needed:.3g}, beyond {spec.scale_dtype}; "
            'use scale_dtype="bfloat16" or rescale the weight.'
        )
    if spec.scale_dtype == FLOAT16 and 0 < needed < _COARSE_FLOAT16:
        raise ValueError(
            f"weights up to {largest:.3g} need scales of {needed:.3g} at most, which float16 holds coarsely or not at "
            'all; use scale_dtype="bfloat16" or rescale the weight.'
        )


def _native(array: Array, role: str) -> Any:
    framework, array = frameworks.resolve(array, role)
    return framework.to_native(array)


def _device_of(native: Any) -> Device:
    return frameworks.of(native).device(native)


def _moved(native: Any, device: Device) -> Any:
    """A copy of a native array on ``device``."""
    source = _device_of(native)
    if device == CPU:
        with on(source):
            return native.get()
    if device.index >= gpu_count():
        gpu(device.index)  # raises with the reason
    cupy = import_cupy("moving a weight to a GPU")
    if source != CPU:  # streams of two GPUs wait for nothing of one another
        cupy.cuda.Device(source.index).synchronize()
    with on(device):
        moved = cupy.asarray(native)
        if source != CPU:
            cupy.cuda.get_current_stream().synchronize()
    return moved


__all__ = ["QuantizedTensor", "Unpacked", "dequantize", "load", "pack", "quantize"]
