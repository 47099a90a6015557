"""Placed: a weight where it is. Views of its memory, addresses, the record of writes, products made ready."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from marlin_cupy import frameworks, ready, writes
from marlin_cupy.device import CPU, Device, on
from marlin_cupy.frameworks import Framework
from marlin_cupy.kernels import tuned
from marlin_cupy.layout import SLAB_N
from marlin_cupy.packing import column_blocks, decoded, derived
from marlin_cupy.ready import Ready
from marlin_cupy.spec import Spec

Array = Any  # an array of any library


class Placed:
    """The arrays of one weight that hold values on one device. Kernels take it as their ``Weight``.

    It is made when it is first needed, is not copied or pickled, and lives as long as the arrays.

    Attributes:
        spec: what the arrays are.
        device: where all of them are.
        native: NumPy or CuPy arrays over their memory, by the names of :attr:`Spec.parts`, those that are there.
        pointer, factors_pointer: device addresses of packed and output_scales, 0 in host memory.
        writes: the record of the GPU, see writes.py.
        ready: products by what x is, see ready.py.
        handed: the same weight in the hands of other libraries, by their names, since the last write.
    """

    #: One weight, not several in one array.
    layer_pointer = 0

    def __init__(self, spec: Spec, parts: Mapping[str, Array | None]) -> None:
        """ValueError, TypeError or UnsupportedError for what is no array of values on one device."""
        packed: Any = parts["packed"]
        framework = frameworks.of(packed)
        if tuple(packed.shape) != spec.layout.packed_shape:
            raise ValueError(
                f"packed has shape {tuple(packed.shape)} and one {spec.format} weight of (K, N) = {spec.shape} "
                f"{spec.layout.packed_shape}; a stack of weights is indexed, w[i], before it is used."
            )
        self.spec = spec
        self.shape = spec.shape
        self.device: Device = framework.device(packed)
        self.native = {name: frameworks.of(part).to_native(part) for name, part in parts.items() if part is not None}
        for name, native in self.native.items():
            if not native.flags.c_contiguous:
                raise ValueError(f"{name} has strides {native.strides}; it must be C-contiguous.")
        self.writes = writes.Writes() if self.device == CPU else writes.of_gpu(self.device.index)
        self.pointer, self.factors_pointer = (self._address(name) for name in ("packed", "output_scales"))
        self.ready: dict[Any, Ready] = {}
        self.handed: dict[str, Any] = {}
        self.writes.mark()  # packed may have been filled a moment ago

    def _address(self, name: str) -> int:
        return int(self.native[name].data.ptr) if self.device != CPU and name in self.native else 0

    @property
    def packed(self) -> Array:
        """The native packed array."""
        return self.native["packed"]

    def multiply(
        self,
        framework: Framework,
        x: Array,
        bias: Array | None = None,
        out: Array | None = None,
        batch_invariant: bool = False,
        dependent: bool = True,
    ) -> Array:
        """``x @ W + bias`` for arrays of ``framework`` that no compiler follows; arguments and errors of api.matmul."""
        key = framework, x.shape, x.dtype, batch_invariant, tuned.generation
        found = self.ready.get(key)
        if found is None:
            found = self._made_ready(key)
        return found.multiply(self, x, bias, out, dependent)

    def _made_ready(self, key: tuple[Framework, Any, Any, bool, int]) -> Ready:
        """Kept; what something was tuned after is thrown away."""
        for old in [other for other in list(self.ready) if other[-1] != key[-1]]:
            self.ready.pop(old, None)
        found = self.ready[key] = ready.product(self.spec, self.device, *key)
        return found

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """The dequantized matrix a run of columns at a time: (columns, native float32[K, columns])."""
        for columns in column_blocks(self.shape, self.device):
            with on(self.device):
                packed = self.packed[columns.start // SLAB_N : -(-columns.stop // SLAB_N)]
                scales = self.native.get("output_scales")
                scales = None if scales is None else scales[columns]
                values = decoded(self.spec.layout, packed, columns.stop - columns.start, scales)
            yield columns, values

    def refresh(self) -> None:
        """After a write: derive parts anew from ``packed``, in the same memory, since launches in graphs read it."""
        self.handed.clear()  # what is handed over anew is ordered behind the write
        if any(part.derived and name in self.native for name, part in self.spec.parts.items()):
            with on(self.device):
                for name, values in derived(self.spec, self.packed).items():
                    self.native[name][...] = values
