"""Replace the linear layers of a model by layers over packed weights. Knows no library: a :class:`Model` does.

    places of all linear layers  ->  which of them, or why not  ->  per weight: pack it, make its layers, put them
    Model.places                     Filter, unsuited, tied         packed, Model.layer, Place.put

``packed`` is the rule that gives a weight: the dense one quantized, or one that a file has already.
"""

from __future__ import annotations

import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from marlin_cupy.device import CPU, Device, import_cupy, on
from marlin_cupy.progress import bar
from marlin_cupy.spec import Spec
from marlin_cupy.tensor import QuantizedTensor

Layer = Any  # a layer of a library

#: Which layers to quantize: a function of name and layer, or patterns of names as of a shell ("*.mlp.*").
Filter = Callable[[str, Layer], bool] | str | Iterable[str]


@dataclass(frozen=True)
class Report:
    """What became of the linear layers of a model.

    Attributes:
        replaced: names of the layers that were quantized, with what they are now. A layer in several places has
            several names.
        kept: names of layers that were left, with the reason.
        bytes_before, bytes_after: of the weights that were quantized.
    """

    replaced: dict[str, Spec]
    kept: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        sizes = f"{self.bytes_before / 1e6:.1f} MB are now {self.bytes_after / 1e6:.1f} MB"
        return "\n".join(
            [
                f"{len(self.replaced)} layers quantized: {sizes}",
                *(f"kept {name}: {reason}" for name, reason in self.kept.items()),
            ]
        )


def matches(filter: Filter | None) -> Callable[[str, Layer], bool]:
    """``filter`` as a function of name and layer; None takes all."""
    if filter is None:
        return lambda name, layer: True
    if callable(filter):
        return filter
    patterns = [filter] if isinstance(filter, str) else list(filter)
    return lambda name, layer: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Place:
    """One place of a linear layer. A layer in several places has several.

    Attributes:
        name: of the layer there.
        layer: the layer.
        weight: stands for its weight. Places of equal ``weight`` share a weight, and get layers that share one too.
        put: sets another layer there.
    """

    name: str
    layer: Layer
    weight: Hashable
    put: Callable[[Layer], None]


class Model(ABC):
    """A model of one library, as :func:`replace` sees it.

    Attributes:
        linear: the library's dense layer. Layers of subclasses are kept.
    """

    linear: type

    @abstractmethod
    def places(self) -> Iterator[Place]:
        """Every place of every layer of class ``linear``, in the order of the report."""

    @abstractmethod
    def weight(self, layer: Layer) -> Any:
        """The dense weight of ``layer``, an array or its shape."""

    @abstractmethod
    def layer(self, old: Layer, w: QuantizedTensor) -> Layer:
        """The layer that takes the place of ``old``: over ``w``, with the bias of ``old``. Its ``spec`` is reported."""

    def unsuited(self, layer: Layer) -> str | None:
        """Why no packed layer can do what ``layer`` does; None if one can."""
        return None

    def tied(self, layer: Layer) -> str | None:
        """Why its weight has to stay as it is, because of something else that uses it; None if it has not."""
        return None


def replace(
    model: Model, packed: Callable[[str, Layer], QuantizedTensor], *, filter: Filter | None, progress: bool
) -> Report:
    """Replace the layers of ``model``, one weight after the other, and say what became of them.

    No more than one weight is held both ways: nothing here holds a layer that has been replaced.

    Args:
        model: what has the layers.
        packed: the new weight of a layer, by its name and itself. Called once for all layers that share a weight.
        filter: which layers; all if None.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: by ``packed`` or ``Model.layer``, with the name of the layer ahead.
    """
    chosen, kept = _sorted_out(model, matches(filter))
    replaced: dict[str, Spec] = {}
    bytes_before = bytes_after = 0
    with bar("quantizing", len(chosen), progress) as begin:
        for weight in list(chosen):
            begin(chosen[weight][0][0].name)
            specs, before, after = _replaced(model, packed, chosen.pop(weight))
            replaced |= specs
            bytes_before += before
            bytes_after += after
    return Report(replaced, kept, bytes_before, bytes_after)


def _sorted_out(
    model: Model, wanted: Callable[[str, Layer], bool]
) -> tuple[dict[Hashable, list[list[Place]]], dict[str, str]]:
    """By weight, of each layer to be replaced its places; and the names of the others with the reasons."""
    layers: dict[tuple[Hashable, int], list[Place]] = {}
    for place in model.places():
        layers.setdefault((place.weight, id(place.layer)), []).append(place)
    chosen: dict[Hashable, list[list[Place]]] = {}
    kept: dict[str, str] = {}
    for (weight, _), places in layers.items():
        reason = _reason_to_keep(model, wanted, places)
        if reason is None:
            chosen.setdefault(weight, []).append(places)
        else:
            kept |= {place.name: reason for place in places}
    return chosen, kept


def _reason_to_keep(model: Model, wanted: Callable[[str, Layer], bool], places: list[Place]) -> str | None:
    layer = places[0].layer
    if type(layer) is not model.linear:
        return f"it is a {type(layer).__name__}, a subclass"
    reason = model.unsuited(layer)
    if reason is None and not any(wanted(place.name, layer) for place in places):
        reason = "the filter left it out"
    return model.tied(layer) if reason is None else reason


def _replaced(
    model: Model, packed: Callable[[str, Layer], QuantizedTensor], layers: list[list[Place]]
) -> tuple[dict[str, Spec], int, int]:
    """Replace layers that share one weight: what they are now, and the bytes of the weight before and after."""
    first = layers[0][0]
    try:
        w = packed(first.name, first.layer)
        new = [model.layer(places[0].layer, w) for places in layers]
    except ValueError as error:
        raise type(error)(f"{first.name}: {error}") from error
    dense = model.weight(first.layer)
    replaced: dict[str, Spec] = {}
    for places, layer in zip(layers, new, strict=True):
        for place in places:
            place.put(layer)
            replaced[place.name] = layer.spec
    return replaced, math.prod(dense.shape) * dense.dtype.itemsize, w.nbytes


def free_cupy_memory(device: Device) -> None:
    """Give CuPy's unused memory back, for the next dense weight, which is in the memory of another library."""
    if device != CPU:
        with on(device):
            import_cupy("a GPU").get_default_memory_pool().free_all_blocks()
