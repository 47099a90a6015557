"""Flax NNX on the CPU: the layer, transformations of it, whole models quantized in place, their checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMATS, HALF, gaussian, rows
from product import Product

import marlin_cupy as mc
from marlin_cupy.numerics import Rounding

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own import
    import orbax.checkpoint
    from flax import nnx

    from marlin_cupy.integrations.flax import Linear, Packed, quantize_model_

K, N = 200, 70


def weight(name: str = "int4", group_size: int = 64) -> mc.QuantizedTensor:
    return mc.quantize(gaussian(K, N, seed=1), name, FORMATS[name].group(group_size))


def activations(M: int, dtype: str = "float16", columns: int = K) -> jax.Array:
    return jnp.asarray(rows((M, columns), seed=M + columns, dtype=dtype))


def same(a: jax.Array, b: jax.Array) -> bool:
    return a.dtype == b.dtype and bool((a == b).all())


def close(a: jax.Array, b: jax.Array) -> bool:
    """But for roundings of sums of bfloat16 and float16."""
    return a.dtype == b.dtype and bool(jnp.allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=2e-2, atol=2e-2))


class Model(nnx.Module):
    """Layers as attributes, in lists, in two places, and one whose kernel another module uses too."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(K, 128, rngs=rngs)
        self.blocks = nnx.Sequential(nnx.Linear(128, 128, use_bias=False, rngs=rngs), nnx.relu)
        self.parts = nnx.data([{"one": nnx.Linear(128, 128, rngs=rngs)}, (nnx.Linear(128, 128, rngs=rngs), 3)])
        self.down = nnx.Linear(128, K, rngs=rngs)
        self.again = self.up
        self.tied, self.with_it = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.with_it.kernel = self.tied.kernel
        self.norm = nnx.LayerNorm(K, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.parts[1][0](self.parts[0]["one"](self.blocks(self.up(x))))
        return self.norm(self.down(y))


NAMES = ["up", "again", "blocks.layers.0", "parts.0.one", "parts.1.0", "down"]


def quantized_model(**options: Any) -> Model:
    model = Model(nnx.Rngs(0))
    quantize_model_(model, "int8", dtype=jnp.bfloat16, **options)
    return model


def loss(model: nnx.Module, x: jax.Array) -> jax.Array:
    return (model(x).astype(jnp.float32) ** 2).mean()


# ---- the layer


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", HALF)
def test_a_layer_gives_what_matmul_gives(name: str, dtype: str) -> None:
    w, bias = weight(name), activations(1, dtype, N)[0]
    x = activations(6, dtype)
    layer = Linear.from_quantized(w, bias)
    assert same(layer(x), mc.matmul(x, w.to("jax"), bias))
    assert same(layer(x.reshape(2, 3, K)), layer(x).reshape(2, 3, N))
    Product(np.asarray(x, np.float64), w.dequantize("float32").astype(np.float64)).check(
        np.asarray(Linear.from_quantized(w)(x), np.float64), Rounding(dtype), name
    )
    assert (layer.quantized.unpack().codes == w.unpack().codes).all()
    assert isinstance(layer.quantized, mc.QuantizedTensor)


def test_from_linear_takes_the_kernel_as_it_is_and_shares_the_bias() -> None:
    dense = nnx.Linear(K, N, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    layer = Linear.from_linear(dense, "int8", 64)
    assert layer.bias is dense.bias
    assert (layer.in_features, layer.out_features, layer.dtype) == (K, N, jnp.bfloat16)
    expected = mc.quantize(np.asarray(dense.kernel[...]), "int8", 64)
    assert (np.asarray(layer.packed[...]) == expected.packed).all()
    x = activations(5, "bfloat16")
    assert close(layer(x), dense(x))
    assert Linear.from_linear(dense, "int8", 64, dtype=jnp.float16).dtype == jnp.float16


def test_dtype_casts_as_that_of_nnx_linear() -> None:
    x, bias = activations(3).astype(jnp.float32), jnp.arange(N, dtype=jnp.float32)
    layer = Linear.from_quantized(weight(), bias, dtype=jnp.float16)
    assert same(layer(x), mc.matmul(x.astype(jnp.float16), weight().to("jax"), bias.astype(jnp.float16)))
    assert layer.bias.dtype == jnp.float32
    without = Linear.from_quantized(weight(), bias)
    assert without(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"x is float32; use float16 or bfloat16, or make the layer with dtype="):
        without(x)


def test_refusals_of_a_layer() -> None:
    with pytest.raises(TypeError, match=r"w is a ndarray; pass a QuantizedTensor"):
        Linear.from_quantized(np.zeros((K, N)))
    with pytest.raises(ValueError, match=r"bias has shape \(3,\); this weight needs \(70,\)"):
        Linear.from_quantized(weight(), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"x has shape \(3, 7\)"):
        Linear.from_quantized(weight())(activations(3, columns=7))


# ---- transformations


def test_a_model_under_jit_and_as_a_state() -> None:
    model, x = quantized_model(), activations(4, "bfloat16")
    expected = model(x)
    assert close(nnx.jit(lambda model, x: model(x))(model, x), expected)
    graph, parameters, packed, rest = nnx.split(model, nnx.Param, Packed, ...)
    assert close(jax.jit(lambda *states: nnx.merge(graph, *states)(x))(parameters, packed, rest), expected)
    assert not jax.tree.leaves(rest)
    assert {array.dtype.name for array in jax.tree.leaves(parameters)} == {"float32"}
    assert {array.dtype.name for array in jax.tree.leaves(packed)} == {"uint8", "float32"}
    batches = jnp.stack([x, -x])
    assert close(nnx.vmap(lambda model, x: model(x), in_axes=(None, 0))(model, batches)[0], expected)


def test_gradients_are_those_of_the_other_parameters() -> None:
    model, x = quantized_model(), activations(4, "bfloat16")
    found = nnx.jit(nnx.grad(loss))(model, x)
    assert jax.tree.structure(found) == jax.tree.structure(nnx.state(model, nnx.Param))
    dense = Model(nnx.Rngs(0))
    expected = nnx.grad(loss)(dense, x)["norm"]["scale"]
    assert jnp.allclose(found["norm"]["scale"][...], expected[...], rtol=0.1, atol=1e-3)
    assert float(jnp.abs(found["again"]["bias"][...]).max()) > 0


def test_layers_under_scan() -> None:
    """Weights of several layers in the arrays of one module."""
    layers = [Linear.from_linear(nnx.Linear(128, 128, rngs=nnx.Rngs(seed), dtype=jnp.float16)) for seed in range(3)]
    x = activations(4, columns=128)
    expected = x
    for layer in layers:
        expected = layer(expected)
    graph = nnx.split(layers[0])[0]
    states = jax.tree.map(lambda *parts: jnp.stack(parts), *[nnx.state(layer) for layer in layers])
    found, _ = jax.lax.scan(lambda y, state: (nnx.merge(graph, state)(y), None), x, states)
    assert close(found, expected)


# ---- models


def test_a_model_is_quantized_in_place() -> None:
    model, x = Model(nnx.Rngs(0)), activations(4, "bfloat16")
    expected = model(x)
    report = quantize_model_(model, "int8", 64, dtype=jnp.bfloat16)
    assert list(report.replaced) == NAMES
    assert {spec.group_size for spec in report.replaced.values()} == {64}
    assert report.kept == dict.fromkeys(["tied", "with_it"], "its kernel is shared with another module")
    assert report.bytes_before == 4 * (2 * K * 128 + 3 * 128 * 128)
    assert report.bytes_after < report.bytes_before / 2
    assert str(report).startswith("6 layers quantized: 0.4 MB are now ")
    assert model.again is model.up
    assert isinstance(model.parts[1][0], Linear)
    assert model.parts[1][1] == 3
    assert float(jnp.abs(model(x) - expected).max()) < 0.1


@pytest.mark.parametrize(
    "filter", ["parts.*", ["parts.0.*", "parts.1.?"], lambda name, layer: "parts" in name and layer.in_features == 128]
)
def test_a_filter_chooses_layers(filter: Any) -> None:
    model = Model(nnx.Rngs(0))
    report = quantize_model_(model, filter=filter)
    assert list(report.replaced) == ["parts.0.one", "parts.1.0"]
    assert report.kept["up"] == report.kept["again"] == "the filter left it out"
    assert isinstance(model.up, nnx.Linear)


def test_layers_that_are_kept() -> None:
    class Special(nnx.Linear):
        pass

    rngs = nnx.Rngs(0)
    model = nnx.Sequential(Special(8, 8, rngs=rngs), nnx.Linear(8, 8, dot_general=lambda *a, **b: a[0], rngs=rngs))
    report = quantize_model_(model)
    assert report.kept == {
        "layers.0": "it is a Special, a subclass",
        "layers.1": "it has a dot_general of its own",
    }
    assert report.replaced == {}


def test_refusals_of_models(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TypeError, match=r"model is a dict; pass an nnx.Module"):
        quantize_model_({})
    with pytest.raises(ValueError, match=r"model is itself an nnx.Linear; use Linear.from_linear"):
        quantize_model_(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    model = Model(nnx.Rngs(0))
    model.down.kernel[...] = model.down.kernel[...].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"^down: weight has NaN"):
        quantize_model_(model, progress=True)
    assert isinstance(model.up, Linear)


def test_a_checkpoint_goes_into_a_model_of_shapes(tmp_path: Path) -> None:
    model, x = quantized_model(), activations(4, "bfloat16")
    shapes = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    report = quantize_model_(shapes, "int8", dtype=jnp.bfloat16)
    assert set(report.replaced) == set(NAMES)
    graph, state = nnx.split(shapes)
    with warnings.catch_warnings(), orbax.checkpoint.StandardCheckpointer() as checkpointer:
        warnings.simplefilter("ignore")
        checkpointer.save(tmp_path / "state", nnx.state(model))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    assert same(nnx.merge(graph, restored)(x), model(x))
