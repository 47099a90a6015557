"""Spec: what a quantized matrix is, apart from its values."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from marlin_cupy import formats
from marlin_cupy.errors import FileFormatError
from marlin_cupy.formats import Format
from marlin_cupy.layout import SLAB_K, SLAB_N, Layout
from marlin_cupy.scalars import BF16, F32, HALF_NAMES, U8, by_name

#: Version of the file format and of the packed layout in it.
FILE_VERSION = 1


@dataclass(frozen=True)
class Part:
    """One of the arrays that a weight consists of.

    Attributes:
        shape, dtype: of the array.
        axes: what each axis runs along: "N" (outputs, in slabs or one by one), "K" (inputs, in slabs), or nothing.
        derived: whether it follows from ``packed``. Files and checksums leave such a part out.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    derived: bool = False

    @property
    def nbytes(self) -> int:
        """Of the array."""
        return math.prod(self.shape) * by_name(self.dtype).bits // 8


@dataclass(frozen=True)
class Spec:
    """The immutable description of a quantized matrix. It does not depend on the activations it will meet."""

    format: str
    shape: tuple[int, int]  # logical (K, N)
    group_size: int  # K per scale; -1: all of K
    scale_dtype: str
    options: tuple[tuple[str, str], ...] = ()  # of the format, those that are not its defaults, sorted

    # Every product asks for these, so that they are computed once; what is computed is not copied or pickled.

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.format, self.shape, self.group_size, self.scale_dtype, self.options))

    def __reduce__(self) -> tuple[type[Spec], tuple[Any, ...]]:
        return Spec, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @functools.cached_property
    def layout(self) -> Layout:
        """Where the codes sit."""
        return Layout(formats.get(self.format), *self.shape, self.group_size, self.scale_dtype)

    @functools.cached_property
    def parts(self) -> dict[str, Part]:
        """The arrays of such a weight, by name, in the order in which trees, files and operators hold them."""
        packed = self.layout.packed_shape
        derived = not formats.get(self.format).has_output_scales(self.group_size)
        return {
            "packed": Part(packed, U8.name, ("N", "K", None)),
            "output_scales": Part((packed[0] * SLAB_N,), F32.name, ("N",), derived),
        }

    @property
    def dense_dtype(self) -> str:
        """The 16-bit type that such a weight goes with: that of its scales if they have 16 bits."""
        return self.scale_dtype if self.scale_dtype in HALF_NAMES else BF16.name

    @property
    def row_step(self) -> int:
        """Where K can be cut: at multiples of this, between slabs and between groups."""
        return SLAB_K if self.group_size == -1 else math.lcm(SLAB_K, self.group_size)

    def of_part(self, packed_shape: tuple[int, ...]) -> Spec:
        """What ``packed`` (..., slabs_n, slabs_k, slab_bytes) holds that is an equal share of such a weight.

        ValueError where that is nothing by itself: shares are whole slabs, without padding, and whole groups.
        """
        whole = self.layout.packed_shape
        if packed_shape[-3:] == whole:
            return self
        K, N = self.shape
        slabs_n, slabs_k, slab_bytes = packed_shape[-3:]
        part = (K if slabs_k == whole[1] else slabs_k * SLAB_K), (N if slabs_n == whole[0] else slabs_n * SLAB_N)
        found = dataclasses.replace(self, shape=part)
        cuts_group = part[0] != K and part[0] % self.row_step
        if slab_bytes != whole[2] or K % part[0] or N % part[1] or cuts_group:
            raise ValueError(
                f"packed has shape {packed_shape}, which is no share of {whole}, a {self.format} weight of (K, N) = "
                f"{self.shape}, group_size={self.group_size}: an equal share has a multiple of {SLAB_N} outputs, or of "
                f"{self.row_step} inputs."
            )
        return found

    def cut(self, rows: slice, columns: slice) -> tuple[Spec, dict[str, tuple[slice, ...]]]:
        """The spec of W[rows, columns], and where that is in each part; ValueError where nothing can be cut there."""
        K, N = self.shape
        k = _bounds("rows", rows, K, self.row_step, f"slabs of {SLAB_K} inputs and whole groups")
        n = _bounds("columns", columns, N, SLAB_N, f"blocks of {SLAB_N} outputs")
        part = dataclasses.replace(self, shape=(k[1] - k[0], n[1] - n[0]))
        slabs: dict[str | None, tuple[int, int, int]] = {
            axis: (start // step, -(-stop // step), -(-size // step))
            for axis, (start, stop), size, step in (("N", n, N, SLAB_N), ("K", k, K, SLAB_K))
        }

        def run(axis: str | None, size: int) -> slice:
            first, end, count = slabs.get(axis, (0, 1, 1))
            return slice(first * size // count, end * size // count)

        return part, {name: tuple(map(run, each.axes, each.shape)) for name, each in self.parts.items()}

    def equal_part(self, axis: int, count: int) -> int:
        """The size of each of ``count`` equal parts of K (axis 0) or N (1); ValueError where it cannot be cut so."""
        size, step = self.shape[axis], (self.row_step, SLAB_N)[axis]
        if count > 1 and size % (count * step):
            fits = [str(n) for n in range(1, max(1, size // step) + 1) if n == 1 or size % (n * step) == 0]
            raise ValueError(
                f"{'KN'[axis]}={size} cannot be cut into {count} equal parts at multiples of {step}; "
                f"into {', '.join(fits)} it can."
            )
        return size // count

    @staticmethod
    def checked(
        format: str,
        shape: tuple[int, int],
        group_size: int | None,
        scale_dtype: str | None = None,
        options: Mapping[str, str] | None = None,
        *,
        like: str = "",
    ) -> Spec:
        """ValueError where there can be no such weight.

        Args:
            format, shape: of the weight.
            group_size: the format's own if None.
            scale_dtype: ``like`` where the format's scales can have that type, or what the format uses, if None.
            options: of the format.
            like: the dtype of the dense weight.
        """
        definition = formats.get(format)
        size = definition.default_group_size if group_size is None else group_size
        if isinstance(size, bool) or not isinstance(size, int) or (size != -1 and (size <= 0 or size % 16)):
            raise ValueError(f"group_size is {size!r}; use -1 (one group) or a positive multiple of 16.")
        definition.check_group_size(size)
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"the shape is {shape!r}; a weight has (K, N), at least (1, 1).")
        scales = definition.checked_scale_dtype(scale_dtype, like, size)
        return Spec(format, shape, size, scales, _checked_options(definition, size, options or {}))

    @property
    def fields(self) -> dict[str, Any]:
        """As files hold it, with the version of the layout; :meth:`of_fields` is the inverse."""
        found: dict[str, Any] = {
            "version": FILE_VERSION,
            "format": self.format,
            "shape": list(self.shape),
            "group_size": self.group_size,
            "scale_dtype": self.scale_dtype,
        }
        return found | {"options": dict(self.options)} if self.options else found

    @staticmethod
    def of_fields(fields: Any, where: object) -> Spec:
        """The spec that ``fields``, found in ``where``, say; FileFormatError where they say none that can be read."""
        try:
            version = int(fields["version"])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise FileFormatError(f"{where} has damaged metadata ({error!r}); save it again.") from error
        if version > FILE_VERSION:
            raise FileFormatError(
                f"{where} has version {version}; this marlin_cupy reads up to {FILE_VERSION}, upgrade it."
            )
        try:
            K, N = map(int, fields["shape"])
            options = {str(name): str(value) for name, value in dict(fields.get("options", {})).items()}
            return Spec.checked(
                str(fields["format"]), (K, N), int(fields["group_size"]), str(fields["scale_dtype"]), options
            )
        except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
            reason = str(error).rstrip(".")
            raise FileFormatError(f"{where} does not hold what it says: {reason}; save it again.") from error


def _checked_options(format: Format, group_size: int, options: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Those that are not the defaults; ValueError where the format has no such option or value."""
    for name, value in options.items():
        if name not in format.options:
            known = f"the option {', '.join(format.options)}" if format.options else "no options"
            raise ValueError(f"option {name!r} was given; format {format.name!r} has {known}.")
        if value not in format.options[name]:
            raise ValueError(f"{name} is {value!r}; format {format.name!r} has {' or '.join(format.options[name])}.")
    chosen = {name: value for name, value in options.items() if value != format.options[name][0]}
    format.check_options(group_size, chosen)
    return tuple(sorted(chosen.items()))


def _bounds(what: str, run: slice, size: int, step: int, pieces: str) -> tuple[int, int]:
    """Where ``run`` of ``size`` begins and ends; ValueError unless a weight can be cut there."""
    start, stop = 0 if run.start is None else run.start, size if run.stop is None else run.stop
    if not 0 <= start < stop <= size or start % step or (stop % step and stop != size) or run.step not in (None, 1):
        asked = f"{start!r} to {stop!r}" + ("" if run.step in (None, 1) else f" by {run.step!r}")
        raise ValueError(
            f"{what} {asked} of {size} were asked for; a packed weight is cut into {pieces}: "
            f"use multiples of {step}, and {size} for the end."
        )
    return start, stop
