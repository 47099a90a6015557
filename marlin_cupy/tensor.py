"""QuantizedTensor: a format, a logical shape and one packed buffer."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import safetensors.numpy

from marlin_cupy import compilers, formats, frameworks
from marlin_cupy.device import CPU, Device, namespace, on
from marlin_cupy.errors import DeviceError, UnsupportedError
from marlin_cupy.files import METADATA_KEY, described, whole_file
from marlin_cupy.frameworks import Framework
from marlin_cupy.layout import Layout
from marlin_cupy.packing import DENSE_NAMES, check_range, checked_weight, derived, device_of, encode, moved
from marlin_cupy.placed import Placed
from marlin_cupy.scalars import by_name
from marlin_cupy.spec import Spec

Array = Any  # an array of any library


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

    # NumPy and CuPy leave ``x @ w`` to __rmatmul__ when they see these.
    __array_ufunc__ = None
    __array_priority__ = 1000

    # Without __slots__, which torch.compile of PyTorch 2.4 cannot look into.

    #: The spec of which ``spec`` is a share, inside jax.shard_map; elsewhere the same.
    whole: Spec
    #: What the arrays are.
    spec: Spec
    #: The arrays by the names of Spec.parts, all of one library; None for a part that follows from packed and is not
    #: needed: in host memory, but for JAX. Tensors over the same memory share them.
    parts: dict[str, Array | None]
    #: Which weight of a stack this is, where the parts (layers, ...) are those of one: an integer array.
    layer: Array | None

    def __init__(self, spec: Spec, packed: Array, **parts: Array | None) -> None:
        """Of ``packed`` and, by name, of other arrays of Spec.parts; those that follow from packed can be left out.

        Raises:
            TypeError, ValueError: no such parts, or arrays of other shapes or dtypes.
        """
        framework, packed = frameworks.resolve(packed, "packed")
        given = {name: None if array is None else _handed(framework, array, name) for name, array in parts.items()}
        given["packed"] = packed
        if not given.keys() <= spec.parts.keys():
            raise TypeError(
                f"{', '.join(given)} were given; of {spec.format} weights there are {', '.join(spec.parts)}."
            )
        for name, part in spec.parts.items():
            array = given.setdefault(name, None)
            if array is None and not part.derived:
                raise ValueError(f"{name} is missing; a {spec.format} weight needs {part.dtype}{part.shape}.")
            if array is not None and (tuple(array.shape) != part.shape or framework.dtype(array) != part.dtype):
                raise ValueError(
                    f"{name} is {framework.dtype(array)}{tuple(array.shape)}; a {spec.format} weight of (K, N) = "
                    f"{spec.shape}, group_size={spec.group_size} needs {part.dtype}{part.shape}."
                )
        placed = Placed(spec, given)
        if placed.device != CPU or framework.takes_apart:
            missing = {name for name, part in spec.parts.items() if part.derived and given[name] is None}
            if missing:
                with on(placed.device):
                    made = derived(spec, placed.packed)
                given |= {name: framework.from_native(made[name]) for name in missing}
                placed = Placed(spec, given)
        self._describe(spec, {name: given[name] for name in spec.parts}, None)
        self.placed = placed
        frameworks.meet(QuantizedTensor)

    def _describe(self, whole: Spec, parts: dict[str, Array | None], layer: Array | None) -> None:
        """What is known of any arrays, also of ones that hold no values yet."""
        self.whole, self.spec, self.parts, self.layer = whole, whole, parts, layer
        shape = getattr(self.packed, "shape", ())
        if len(shape) >= 3:
            with contextlib.suppress(ValueError):  # who computes with it says so
                self.spec = whole.of_part(tuple(shape))

    @staticmethod
    def of_parts(whole: Spec, parts: Mapping[str, Any], layer: Any = None) -> QuantizedTensor:
        """Of parts that may be traced, shares of arrays, stacks of them, or no arrays at all.

        Nothing is looked at before it is used.
        """
        found = object.__new__(QuantizedTensor)
        found._describe(whole, {name: parts.get(name) for name in whole.parts}, layer)
        return found

    @property
    def tree(self) -> dict[str, Array | None]:
        """All arrays by name, for libraries that take trees of arrays apart; with ``whole`` it is all there is."""
        return {**self.parts, "layer": self.layer}

    @staticmethod
    def of_tree(whole: Spec, arrays: Iterable[Any]) -> QuantizedTensor:
        """Of what :attr:`tree` held, in its order, whatever has become of it: see :meth:`of_parts`."""
        *parts, layer = arrays
        return QuantizedTensor.of_parts(whole, dict(zip(whole.parts, parts, strict=True)), layer)

    @functools.cached_property
    def placed(self) -> Placed:
        """What is known of the arrays where they are; ValueError, TypeError or UnsupportedError if they hold no values.

        Of a stack's weight that is a copy: only kernels launched by a compiled program read it in place.
        """
        if self.layer is None:
            return Placed(self.spec, self.parts)
        return Placed(
            self.spec, {name: None if part is None else part[self.layer] for name, part in self.parts.items()}
        )

    @property
    def packed(self) -> Array:
        """Codes and their parameters, uint8, see layout.py."""
        return self.parts["packed"]

    @property
    def output_scales(self) -> Array | None:
        """float32 per output, padding included; None where nothing needs them, see Spec.parts."""
        return self.parts["output_scales"]

    @property
    def device(self) -> Device:
        """Where the arrays are."""
        return self.placed.device

    @property
    def layout(self) -> Layout:
        """Where the codes sit in packed."""
        return self.spec.layout

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
        """Bytes of the arrays that files keep, scales and padding included."""
        return sum(part.nbytes for part in self.spec.parts.values() if not part.derived)

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
        return QuantizedTensor.of_parts(self.whole, self.parts, layer)

    def __rmatmul__(self, x: Array) -> Array:
        return self.multiply(x)

    def multiply(
        self,
        x: Array,
        bias: Array | None = None,
        out: Array | None = None,
        batch_invariant: bool = False,
        dependent: bool = True,
    ) -> Array:
        """y = x @ W + bias, see :func:`marlin_cupy.matmul`."""
        framework, x = frameworks.resolve(x)
        if framework.follows(x, self.packed, bias):
            if out is not None:
                raise TypeError(
                    f"out was given and {framework.name} follows this product; use what matmul returns instead."
                )
            return compilers.of(framework).matmul(x, self, bias, batch_invariant, dependent)
        return self.placed.multiply(framework, x, bias, out, batch_invariant, dependent)

    def unpack(self) -> Unpacked:
        """Logical codes and parameters as NumPy or CuPy arrays: the exact inverse of :func:`pack`."""
        with on(self.device):
            codes, bits = self.layout.unpack(self.placed.packed, self.shape[1])
        if formats.SCALE not in bits:
            bits[formats.SCALE] = self.placed.native["output_scales"][None, : self.shape[1]]
        scale = self.layout.scale
        dtype = scale.dtype if scale.name in DENSE_NAMES else scale.stored_as
        zero_points = bits.get(formats.ZERO_POINT)
        return Unpacked(
            codes, bits[formats.SCALE].view(dtype), None if zero_points is None else zero_points.view(dtype)
        )

    def dequantize(self, dtype: str | None = None) -> Array:
        """W (K, N) in ``dtype`` ("float16", "bfloat16", "float32"; default: that of the scales).

        The result is in the library and on the device of ``packed``.
        """
        dtype = dtype or self.spec.dense_dtype
        if dtype not in DENSE_NAMES:
            raise ValueError(f"dtype is {dtype!r}; use one of {', '.join(DENSE_NAMES)}.")
        xp, scalar = namespace(self.placed.packed), by_name(dtype)
        with on(self.device):
            result = xp.empty(self.shape, dtype=scalar.dtype)
            for columns, values in self.blocks():
                result.view(scalar.stored_as)[:, columns] = scalar.to_bits(values)
        return frameworks.of(self.packed).from_native(result)

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """The dequantized matrix a run of columns at a time: (columns, native float32[K, columns])."""
        return self.placed.blocks()

    def to(self, where: str | Device) -> QuantizedTensor:
        """The same weight in another library or on another device.

        Args:
            where: "numpy", "cupy", "torch" or "jax" (shares memory where both are on the same device;
                JAX on the CPU copies), or "cpu", "cuda", "cuda:N" (copies, as a NumPy or CuPy array).
        """
        native = self.placed.native
        if isinstance(where, str) and where in frameworks.NAMES:
            if where == "cupy" and self.device == CPU:
                return self.to("cuda")
            if where == "numpy" and self.device != CPU:
                return self.to(CPU)
            framework = frameworks.by_name(where)
            kept = self._kept(where != "numpy")
            return QuantizedTensor(self.spec, **{name: framework.from_native(native[name]) for name in kept})
        try:
            device = Device.parse(where)
        except ValueError:
            raise ValueError(
                f"where is {where!r}; use a library ({', '.join(frameworks.NAMES)}) "
                'or a device ("cpu", "cuda", "cuda:N").'
            ) from None
        if device == self.device:
            return QuantizedTensor(self.spec, **native)
        if device == CPU:
            native = {name: native[name] for name in self._kept(derived=False)}
        elif self.device == CPU:  # derived here, where that needs no kernel to be compiled
            native = {**native, **derived(self.spec, self.placed.packed)}
        return QuantizedTensor(self.spec, **{name: moved(array, device) for name, array in native.items()})

    def in_hands_of(self, library: str) -> QuantizedTensor:
        """As :meth:`to` where that shares memory, handed over once until the memory is written again."""
        found = self.placed.handed.get(library)
        if found is None:
            found = self.placed.handed[library] = self.to(library)
        return found

    def _kept(self, derived: bool) -> list[str]:
        """The parts that are there, with or without derived ones."""
        return [
            name
            for name, part in self.spec.parts.items()
            if name in self.placed.native and (derived or not part.derived)
        ]

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
        """Parts that follow from packed are made anew."""
        spec, runs = self.spec.cut(rows, columns)
        framework = frameworks.of(self.packed)
        with on(self.device):
            cut = {name: self.placed.native[name][runs[name]].copy() for name in self._kept(derived=False)}
        return QuantizedTensor(spec, **{name: framework.from_native(part) for name, part in cut.items()})

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
        with self.placed.writes.writing():
            encode(native, self.spec, search, **self.placed.native)
            self.placed.refresh()
        framework.settle(native)
        return self

    def mark_written(self) -> None:
        """Say that something other than marlin_cupy has written into ``packed``, before the next :func:`matmul`.

        Call it when the kernel that writes has been enqueued and, where that was on another stream than the
        multiplication, or on a branch of a graph that is being captured, when the streams have been joined. The next
        multiplication on each stream of this GPU is then a plain launch; see ``dependent`` of :func:`matmul`. What is
        kept of the scales is read anew, on CuPy's current stream.
        """
        with self.placed.writes.writing():
            self.placed.refresh()

    def __reduce__(self) -> tuple[Callable[..., QuantizedTensor], tuple[Any, ...]]:
        # Copies and pickles are made anew: addresses and loaded kernels do not travel.
        if "placed" in self.__dict__ and self.layer is None:
            return _placed_again, (self.spec, {name: self.parts[name] for name in self._kept(derived=False)})
        return _copied, (self.whole, self.parts, self.layer)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: the uint8 tensor "packed", "output_scales" of formats that have such scales, and
        the description as metadata.

        The file appears whole or not at all.
        """
        path, native = Path(path), self.placed.native
        parts = {
            name: numpy.ascontiguousarray(native[name] if self.device == CPU else moved(native[name], CPU))
            for name in self._kept(derived=False)
        }
        metadata = {METADATA_KEY: json.dumps(described(self.spec, parts), sort_keys=True)}
        with whole_file(path) as temporary:
            safetensors.numpy.save_file(parts, temporary, metadata=metadata)


def _placed_again(spec: Spec, parts: dict[str, Array]) -> QuantizedTensor:
    return QuantizedTensor(spec, **parts)


def _copied(whole: Spec, parts: dict[str, Array | None], layer: Array | None) -> QuantizedTensor:
    """A copy of what :meth:`QuantizedTensor.of_parts` put together: a stack, or traced, or spread over devices."""
    frameworks.meet(QuantizedTensor)
    return QuantizedTensor.of_parts(whole, parts, layer)


def _handed(framework: Framework, array: Array, role: str) -> Array:
    """``array`` in the hands of ``framework``."""
    theirs, array = frameworks.resolve(array, role)
    return array if theirs is framework else framework.from_native(theirs.to_native(array))
