"""Equinox on the CPU: the layer, transformations of it, whole models, their files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian, rows

import marlin_cupy as mc

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own import
    import equinox as eqx

    from marlin_cupy.integrations.equinox import Linear, quantize_model

K, N = 200, 70


def weight() -> mc.QuantizedTensor:
    return mc.quantize(gaussian(K, N, seed=1), "int4", 64)


def activations(M: int, dtype: str = "float16", columns: int = K) -> jax.Array:
    return jnp.asarray(rows((M, columns), seed=M + columns, dtype=dtype))


def model(_: Any = None) -> eqx.nn.MLP:
    return eqx.nn.MLP(K, N, 128, 2, key=jax.random.key(0))


def close(a: jax.Array, b: jax.Array) -> bool:
    """But for roundings of sums of bfloat16 and float16."""
    return a.dtype == b.dtype and bool(jnp.allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=2e-2, atol=2e-2))


def loss(model: Any, x: jax.Array) -> jax.Array:
    return (jax.vmap(model)(x).astype(jnp.float32) ** 2).mean()


def test_a_layer_gives_what_matmul_gives() -> None:
    x, bias = activations(6), activations(1, columns=N)[0]
    layer = Linear.from_quantized(weight(), bias)
    expected = mc.matmul(x, weight().to("jax"), bias)
    for found in (layer(x), jax.vmap(layer)(x), eqx.filter_jit(eqx.filter_vmap(layer))(x), layer(x[0])[None]):
        assert close(found, expected[: len(found)])
    assert (layer.quantized.unpack().codes == weight().unpack().codes).all()
    wide = Linear.from_quantized(weight(), bias.astype(jnp.float32), dtype=jnp.float16)
    assert close(wide(x.astype(jnp.float32)), expected)
    with pytest.raises(ValueError, match=r"x is float32; use float16 or bfloat16, or make the layer with dtype="):
        layer(x.astype(jnp.float32))


def test_refusals_of_a_layer() -> None:
    with pytest.raises(TypeError, match=r"w is a ndarray; pass a QuantizedTensor"):
        Linear.from_quantized(np.zeros((K, N)))
    with pytest.raises(ValueError, match=r"bias has shape \(3,\); this weight needs \(70,\)"):
        Linear.from_quantized(weight(), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"scalar"):
        Linear.from_linear(eqx.nn.Linear("scalar", N, key=jax.random.key(0)))


def test_from_linear_transposes() -> None:
    dense = eqx.nn.Linear(K, N, key=jax.random.key(0))
    layer = Linear.from_linear(dense, "int8", 64, dtype=jnp.bfloat16)
    assert layer.bias is dense.bias
    assert (np.asarray(layer.packed) == mc.quantize(np.asarray(dense.weight).T, "int8", 64).packed).all()


def test_a_model_is_quantized() -> None:
    dense, x = model(), activations(5, "bfloat16")
    quantized, report = quantize_model(dense, "int8", 64, dtype=jnp.bfloat16, filter=["layers.[01]"])
    assert list(report.replaced) == ["layers.0", "layers.1"]
    assert report.kept == {"layers.2": "the filter left it out"}
    assert report.bytes_before == 4 * 128 * (K + 128)
    assert report.bytes_after < report.bytes_before / 2
    assert isinstance(dense.layers[0], eqx.nn.Linear)
    assert quantized.layers[2].weight is dense.layers[2].weight
    assert jnp.allclose(jax.vmap(quantized)(x), jax.vmap(dense)(x), rtol=2e-2, atol=2e-2)


def test_layers_that_are_kept() -> None:
    class Special(eqx.nn.Linear):
        pass

    key = jax.random.key(0)
    layers = [Special(8, 8, key=key), eqx.nn.Linear(8, "scalar", key=key)]
    _, report = quantize_model(layers)
    assert report.kept == {"0": "it is a Special, a subclass", "1": "it takes or returns a scalar"}
    with pytest.raises(ValueError, match=r"^1: group_size"):
        quantize_model([None, eqx.nn.Linear(8, 8, key=key)], group_size=7)


def test_gradients_are_those_of_the_other_parameters() -> None:
    x = activations(5, "bfloat16")
    quantized, _ = quantize_model(model(), "int8", dtype=jnp.bfloat16, filter=lambda name, layer: name != "layers.2")
    found = eqx.filter_jit(eqx.filter_grad(loss))(quantized, x)
    expected = eqx.filter_grad(loss)(model(), x)
    assert found.layers[0].packed is None
    assert found.layers[0].factor_bits is None
    for ours, dense in zip(found.layers, expected.layers, strict=True):
        assert jnp.allclose(ours.bias, dense.bias, rtol=0.1, atol=1e-3)
    assert jnp.allclose(found.layers[2].weight, expected.layers[2].weight, rtol=0.1, atol=1e-3)


def test_a_file_goes_into_a_model_of_shapes(tmp_path: Path) -> None:
    x = activations(5, "bfloat16")
    quantized, _ = quantize_model(model(), "int8", dtype=jnp.bfloat16)
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", quantized)
    shapes, report = quantize_model(eqx.filter_eval_shape(model), "int8", dtype=jnp.bfloat16)
    assert len(report.replaced) == 3
    loaded = eqx.tree_deserialise_leaves(tmp_path / "model.eqx", shapes)
    assert (jax.vmap(loaded)(x) == jax.vmap(quantized)(x)).all()
