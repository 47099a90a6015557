"""Replacing the layers of a model of no library: a list of layers, some of which share a weight."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cases import gaussian

import marlin_cupy as mc
from marlin_cupy.integrations import replacing
from marlin_cupy.integrations.replacing import Place, Report, replace

K, N = 32, 16


class Dense:
    def __init__(self, weight: np.ndarray) -> None:
        self.weight = weight


class Special(Dense):
    pass


class Packed:
    def __init__(self, w: mc.QuantizedTensor) -> None:
        self.w, self.spec = w, w.spec


class Layers(replacing.Model):
    """Of a list."""

    linear = Dense

    def __init__(self, layers: list[Any], unsuited: Any = None, tied: Any = None) -> None:
        self.layers = layers
        self._unsuited, self._tied = unsuited, tied

    def places(self) -> Iterator[Place]:
        for position, layer in enumerate(self.layers):
            if isinstance(layer, Dense):
                put = functools.partial(self.layers.__setitem__, position)
                yield Place(f"layers.{position}", layer, id(layer.weight), put)

    def weight(self, layer: Dense) -> np.ndarray:
        return layer.weight

    def layer(self, old: Dense, w: mc.QuantizedTensor) -> Packed:
        return Packed(w)

    def unsuited(self, layer: Dense) -> str | None:
        return "it is unsuited" if layer is self._unsuited else None

    def tied(self, layer: Dense) -> str | None:
        return "it is tied" if layer is self._tied else None


def dense(seed: int = 0) -> Dense:
    return Dense(gaussian(K, N, seed=seed))


def packed(name: str, layer: Dense) -> mc.QuantizedTensor:
    return mc.quantize(layer.weight, "int4", 16)


def quantized(model: Layers, filter: Any = None, rule: Callable[[str, Any], mc.QuantizedTensor] = packed) -> Report:
    return replace(model, rule, filter=filter, progress=False)


def test_layers_and_weights_in_several_places_stay_shared() -> None:
    first, other = dense(1), dense(2)
    twin = Dense(first.weight)
    model = Layers([first, other, "no layer", first, twin])
    asked: list[str] = []

    def rule(name: str, layer: Dense) -> mc.QuantizedTensor:
        asked.append(name)
        return packed(name, layer)

    report = quantized(model, rule=rule)
    assert asked == ["layers.0", "layers.1"]  # once per weight
    assert list(report.replaced) == ["layers.0", "layers.3", "layers.4", "layers.1"]
    new = model.layers
    assert new[0] is new[3]
    assert new[4] is not new[0]
    assert new[4].w is new[0].w
    assert new[2] == "no layer"
    assert (report.kept, report.bytes_before) == ({}, 2 * 4 * K * N)
    assert report.bytes_after == new[0].w.nbytes + new[1].w.nbytes


def test_what_is_kept_is_named_with_the_first_reason() -> None:
    unsuited, tied, special = dense(1), dense(2), Special(gaussian(K, N, seed=3))
    layers = [special, unsuited, tied, tied, dense(4)]
    model = Layers(list(layers), unsuited, tied)
    assert quantized(model, filter=()).kept == {
        "layers.0": "it is a Special, a subclass",
        "layers.1": "it is unsuited",
        "layers.2": "the filter left it out",
        "layers.3": "the filter left it out",
        "layers.4": "the filter left it out",
    }
    assert model.layers == layers
    report = quantized(model, filter=["layers.[023]"])
    assert report.kept["layers.2"] == report.kept["layers.3"] == "it is tied"
    assert report.kept["layers.4"] == "the filter left it out"
    assert list(quantized(model).replaced) == ["layers.4"]


def test_a_filter_that_takes_one_place_takes_the_layer() -> None:
    layer = dense()
    model = Layers([layer, layer])
    assert list(quantized(model, filter="*.1").replaced) == ["layers.0", "layers.1"]


def test_no_dense_layer_is_held_when_the_next_is_packed() -> None:
    model = Layers([dense(seed) for seed in range(4)])
    there = [weakref.ref(layer) for layer in model.layers]
    alive: list[int] = []

    def counting(name: str, layer: Dense) -> mc.QuantizedTensor:
        alive.append(sum(each() is not None for each in there))
        return packed(name, layer)

    quantized(model, rule=counting)
    assert alive == [4, 3, 2, 1]


def test_weights_may_come_from_anywhere() -> None:
    """From a checkpoint, for instance."""
    stored = {f"layers.{index}": mc.quantize(gaussian(K, N, seed=9), "nf4", 16) for index in range(2)}
    model = Layers([dense(1), dense(2), dense(3)])
    report = quantized(model, filter=stored, rule=lambda name, layer: stored[name])
    assert [layer.w for layer in model.layers[:2]] == list(stored.values())
    assert {spec.format for spec in report.replaced.values()} == {"nf4"}
    assert list(report.kept) == ["layers.2"]


def test_a_refusal_names_the_layer_and_leaves_those_ahead_replaced() -> None:
    bad = dense(2)
    bad.weight[0, 0] = np.nan
    model = Layers([dense(1), bad, bad])
    with pytest.raises(ValueError, match=r"^layers\.1: weight has NaN"):
        quantized(model)
    assert isinstance(model.layers[0], Packed)
    assert model.layers[1] is model.layers[2] is bad
