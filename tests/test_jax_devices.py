"""JAX on several devices: weights split by columns, rows or both, in jit and in shard_map; two processes."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMATS
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax_arrays import activations, check, check_gradient, check_sum, check_sum_of_parts, float64, runs, weight
from ranks import run_ranks

import marlin_cupy as mc
from marlin_cupy.integrations.jax import export_checks, partition_specs, shard, stack

K, HIDDEN, N, M = 512, 1024, 256, 8
P: Any = PartitionSpec


def mesh(**axes: int) -> Mesh:
    """Of the CPU's devices, however many others there are."""
    devices = np.array(jax.devices("cpu")[: math.prod(axes.values())])
    return Mesh(devices.reshape(tuple(axes.values())), tuple(axes))


LINE, SQUARE = functools.partial(mesh, model=4), functools.partial(mesh, data=2, model=2)
#: Mesh, how the weight (K, N) lies on it, x (M, K), y (M, N).
PLACES: dict[str, tuple[Callable[[], Mesh], Any, Any, Any]] = {
    "columns": (LINE, P(None, "model"), P(), P(None, "model")),
    "rows": (LINE, P("model", None), P(None, "model"), P()),
    "rows, x everywhere": (LINE, P("model"), P(), P()),
    "both": (SQUARE, P("data", "model"), P(None, "data"), P(None, "model")),
    "batch": (LINE, P(), P("model"), P("model")),
    "batch and columns": (SQUARE, P(None, "model"), P("data"), P("data", "model")),
    "batch and rows": (SQUARE, P("model"), P("data", "model"), P("data")),
    "columns of two axes": (SQUARE, P(None, ("data", "model")), P(), P(None, ("data", "model"))),
}
#: Into how many parts K is cut.
SHARES = {"rows": 4, "rows, x everywhere": 4, "both": 2, "batch and rows": 2}
#: Into how many N is.
SHARES_OF_N = {"columns": 4, "both": 2, "batch and columns": 2, "columns of two axes": 4}
every_place = pytest.mark.parametrize("place", PLACES)


def whole(name: str = "int4", group_size: int = 64) -> mc.QuantizedTensor:
    return weight(name, group_size, (K, N))


def placed(
    place: str, name: str = "int4", rows: int = M, group_size: int = 64
) -> tuple[jax.Array, mc.QuantizedTensor, jax.Array, Any]:
    """x, w and bias on the mesh, and where y is to be."""
    make, of_w, of_x, of_y = PLACES[place]
    devices = make()
    x = jax.device_put(activations((rows, K)), NamedSharding(devices, of_x))
    bias = jax.device_put(activations((N,)), NamedSharding(devices, P(*of_y[1:])))
    return x, shard(whole(name, group_size), devices, of_w), bias, NamedSharding(devices, of_y)


_EXCHANGE = re.compile(
    r"= \(?(\w+)\[([\d,]*)\][^=]*? (?:all-gather|all-to-all|collective-permute|ragged-all-to-all|collective-broadcast"
    r"|all-reduce|reduce-scatter)(?:-start)?\("
)


def exchanged(function: Any, *arguments: Any) -> list[tuple[str, int]]:
    """(type, elements) of what the devices send each other when the program runs."""
    program = jax.jit(function).lower(*arguments).compile().as_text()
    return [(kind, math.prod(map(int, filter(None, shape.split(","))))) for kind, shape in _EXCHANGE.findall(program)]


def assert_no_weight_moves(found: list[tuple[str, int]]) -> None:
    """Neither packed nor decoded, whole or a part: what moves is no larger than x or y, and no bytes."""
    assert not [each for each in found if each[0] in ("u8", "s8", "u32", "s32") or each[1] > M * max(K, N)], found


def test_what_moves_is_seen() -> None:
    """The check itself, on a program that gathers a weight."""
    w = placed("columns")[1]
    everywhere = NamedSharding(LINE(), P())
    gathering = jax.jit(lambda w: jax.tree.map(lambda part: part + 0, w), out_shardings=everywhere)
    assert any(kind == "u8" for kind, _ in exchanged(gathering, w))
    with pytest.raises(AssertionError):
        assert_no_weight_moves(exchanged(gathering, w))


# ---- jit


@every_place
def test_a_compiled_product_is_computed_where_the_shares_are(place: str) -> None:
    x, w, bias, of_y = placed(place)
    for arguments in ((x, w), (x, w, bias)):
        y = jax.jit(mc.matmul)(*arguments)
        check(y, x, whole(), *arguments[2:], case=place, shares=SHARES.get(place, 1))
        assert y.sharding.is_equivalent_to(of_y, 2)
        assert_no_weight_moves(exchanged(mc.matmul, *arguments))
    check(x @ w, x, whole(), case="eagerly", shares=SHARES.get(place, 1))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("place", ["columns", "rows"])
def test_every_format_has_shares(name: str, place: str) -> None:
    x, w, _, _ = placed(place, name)
    assert w.spec == whole(name).spec
    assert len(w.packed.addressable_shards) == 4
    assert w.packed.addressable_shards[0].data.nbytes * 4 == whole(name).packed.nbytes
    check(jax.jit(mc.matmul)(x, w), x, whole(name), shares=SHARES.get(place, 1))


@every_place
def test_scales_of_outputs_lie_where_the_outputs_are(place: str) -> None:
    x, w, _, of_y = placed(place, "fp8_e4m3", group_size=-1)
    expected = whole("fp8_e4m3", -1)
    check(jax.jit(mc.matmul)(x, w), x, expected, shares=SHARES.get(place, 1))
    assert_no_weight_moves(exchanged(mc.matmul, x, w))
    dy = jax.device_put(activations((M, N), seed=5), of_y)
    dx = jax.jit(lambda x, w, dy: jax.vjp(lambda x: x @ w, x)[1](dy)[0])(x, w, dy)
    check_gradient(dx, dy, expected, shares=SHARES_OF_N.get(place, 1))


@every_place
def test_meshes_with_explicit_axes(place: str) -> None:
    """As jax.make_mesh makes them: types have shardings, and that of the result follows from those of the operands."""
    make, of_w, of_x, of_y = PLACES[place]
    automatic = make()
    explicit = Mesh(
        automatic.devices, automatic.axis_names, axis_types=(jax.sharding.AxisType.Explicit,) * automatic.devices.ndim
    )
    w, x = whole(), activations((M, K))
    y = jax.jit(mc.matmul)(jax.device_put(x, NamedSharding(explicit, of_x)), shard(w, explicit, of_w))
    same = jax.jit(mc.matmul)(jax.device_put(x, NamedSharding(automatic, of_x)), shard(w, automatic, of_w))
    np.testing.assert_array_equal(float64(y), float64(same))
    assert y.sharding.is_equivalent_to(NamedSharding(explicit, of_y), 2)
    dx = jax.jit(jax.grad(lambda x, w: (x @ w).astype(jnp.float32).sum()))(
        jax.device_put(x, NamedSharding(explicit, of_x)), shard(w, explicit, of_w)
    )
    check_gradient(dx, jnp.ones((M, N), jnp.float16), w, shares=SHARES_OF_N.get(place, 1))


@pytest.mark.parametrize("axes", [2, 0])
def test_rows_of_other_numbers(axes: int) -> None:
    """More axes, and fewer rows than devices."""
    x, w, bias, _ = placed("columns", rows=6)
    shaped = x.reshape(2, 3, K) if axes else x[:1]
    check(jax.jit(mc.matmul)(shaped, w, bias), shaped, whole(), bias)
    assert jax.jit(mc.matmul)(x[:0], w).shape == (0, N)
    check(jax.jit(jax.vmap(lambda x: x @ w))(x.reshape(2, 3, K)), x.reshape(2, 3, K), whole())


def test_two_layers_exchange_nothing_but_sums() -> None:
    """A column parallel and then a row parallel layer: one sum over the devices."""
    devices = LINE()
    first, second = weight("int4", 64, (K, HIDDEN)), weight("int4", 64, (HIDDEN, N))
    up, down = shard(first, devices, P(None, "model")), shard(second, devices, P("model"))
    x = jax.device_put(activations((M, K)), NamedSharding(devices, P()))

    def block(x: jax.Array, up: Any, down: Any) -> tuple[jax.Array, jax.Array]:
        hidden = jax.nn.relu(x @ up)
        return hidden, hidden @ down

    hidden, y = jax.jit(block)(x, up, down)
    check(y, hidden, second, shares=4)
    found = exchanged(lambda *given: block(*given)[1], x, up, down)
    assert [elements for _, elements in found] == [M * N]


@every_place
def test_gradients_are_those_of_the_whole(place: str) -> None:
    x, w, bias, of_y = placed(place)
    dy = jax.device_put(activations((M, N), seed=5), of_y)

    @jax.jit
    def gradients(x: jax.Array, bias: jax.Array, w: mc.QuantizedTensor, dy: jax.Array) -> Any:
        return jax.vjp(lambda x, bias: mc.matmul(x, w, bias), x, bias)[1](dy)

    dx, dbias = gradients(x, bias, w, dy)
    check_gradient(dx, dy, whole(), shares=SHARES_OF_N.get(place, 1))
    check_sum(dbias, dy)


@every_place
def test_gradients_gather_no_weight(place: str) -> None:
    x, w, _, of_y = placed(place)
    dy = jax.device_put(activations((M, N), seed=5), of_y)
    assert_no_weight_moves(exchanged(lambda x, w, dy: jax.vjp(lambda x: x @ w, x)[1](dy)[0], x, w, dy))


@pytest.mark.parametrize("of_w", [P(None, "model"), P("model")])
def test_stacks_are_split_like_weights(of_w: Any) -> None:
    devices, layers = LINE(), [weight("int4", 64, (K, K), seed) for seed in range(3)]
    split = shard(stack(layers), devices, of_w)
    assert "K=512, N=512" in repr(split)
    x = jax.device_put(activations((M, K)), NamedSharding(devices, P()))
    scale = np.float16(1 / 32)

    def in_place(x: jax.Array, stack: mc.QuantizedTensor) -> Any:
        return jax.lax.scan(lambda x, i: (x @ stack[i] * scale, (x, x @ stack[i])), x, jnp.arange(3))[1]

    def sliced(x: jax.Array, stack: mc.QuantizedTensor) -> Any:
        return jax.lax.scan(lambda x, w: (x @ w * scale, (x, x @ w)), x, stack)[1]

    for program in (in_place, sliced):
        for one, y, w in zip(*jax.jit(program)(x, split), layers, strict=True):
            check(y, one, w, case=program.__name__, shares=4 if of_w[0] else 1)
        assert_no_weight_moves(exchanged(program, x, split))


# ---- shard_map


def host(shape: tuple[int, ...], seed: int = 3) -> np.ndarray:
    """On no device yet."""
    return np.asarray(activations(shape, seed=seed))


def test_columns_in_shard_map() -> None:
    devices, x, bias = LINE(), host((M, K)), host((N,))
    in_specs = P(), partition_specs(whole(), devices, P(None, "model")), P("model")

    def on_each(x: jax.Array, w: mc.QuantizedTensor, bias: jax.Array) -> jax.Array:
        assert (w.shape, w.whole.shape, w.packed.shape[0]) == ((K, N // 4), (K, N), 1)
        assert f"N={N // 4}" in repr(w)
        return mc.matmul(x, w, bias)

    multiply = jax.shard_map(on_each, mesh=devices, in_specs=in_specs, out_specs=P(None, "model"))
    check(jax.jit(multiply)(x, whole().to("numpy"), bias), x, whole(), bias)
    check(multiply(x, shard(whole(), devices, P(None, "model")), bias), x, whole(), bias)


def test_rows_in_shard_map_are_added_up() -> None:
    devices, x = LINE(), host((M, K))
    in_specs = P(None, "model"), partition_specs(whole(), devices, P("model"))

    def on_each(x: jax.Array, w: mc.QuantizedTensor) -> jax.Array:
        assert (x.shape, w.shape) == ((M, K // 4), (K // 4, N))
        return jax.lax.psum((x @ w).astype(jnp.float32), "model").astype(x.dtype)

    y = jax.jit(jax.shard_map(on_each, mesh=devices, in_specs=in_specs, out_specs=P()))(x, whole().to("numpy"))
    check(y, x, whole(), shares=4)


@pytest.mark.parametrize("of_w", [P(None, "model"), P("model")])
@pytest.mark.parametrize("is_checked", [True, False])
def test_gradients_inside_shard_map(of_w: Any, is_checked: bool) -> None:
    """Differentiated outside of shard_map: JAX adds up what each device contributes."""
    devices, by_rows = LINE(), of_w[0] is not None
    x, bias, dy = host((M, K)), host((N,)), host((M, N), seed=5)
    of_x, of_y = (P(None, "model"), P()) if by_rows else (P(), P(None, "model"))
    w = shard(whole(), devices, of_w)

    def on_each(x: jax.Array, w: mc.QuantizedTensor, bias: jax.Array) -> jax.Array:
        if by_rows:
            return jax.lax.psum((x @ w).astype(jnp.float32), "model").astype(x.dtype) + bias
        return mc.matmul(x, w, bias)

    in_specs = of_x, partition_specs(w, devices, of_w), P(*of_y[1:])
    multiply = jax.shard_map(on_each, mesh=devices, in_specs=in_specs, out_specs=of_y, check_vma=is_checked)
    dx, dbias = jax.jit(lambda x, w, bias: jax.vjp(lambda x, bias: multiply(x, w, bias), x, bias)[1](dy))(x, w, bias)
    if by_rows:  # each device has what is to be the gradient of its part of x
        check_gradient(dx, dy, whole())
    else:  # parts, which JAX adds up in float16: three more roundings, of what is no larger than all parts together
        parts = [float64(dy)[:, run] @ float64(whole().dequantize("float32")).T[run] for run in runs(N, 4)]
        check_sum_of_parts(float64(dx), sum(parts), 4 * parts, "float16")
    assert dbias.shape == bias.shape
    # Where JAX adds bias it sums up in float16: M times.
    check_sum_of_parts(float64(dbias), float64(dy).sum(0), M * list(float64(dy)), "float16")


@pytest.mark.parametrize("of_w", [P(None, "model"), P("model")])
def test_gradients_taken_inside_shard_map(of_w: Any) -> None:
    """By each device for what it has; x and bias that are the same everywhere have gradients that are, too."""
    devices, by_rows = LINE(), of_w[0] is not None
    x, w, bias = host((M, K)), whole().to("numpy"), host((N,))
    of_x, of_bias = (P(None, "model"), P()) if by_rows else (P(), P("model"))
    in_specs = of_x, partition_specs(whole(), devices, of_w), of_bias

    def on_each(x: jax.Array, w: mc.QuantizedTensor, bias: jax.Array) -> Any:
        def loss(x: jax.Array, bias: jax.Array) -> jax.Array:
            y = mc.matmul(x, w, bias).astype(jnp.float32).sum()
            return jax.lax.psum(y, "model")

        return jax.grad(loss, (0, 1))(x, bias)

    found = jax.shard_map(on_each, mesh=devices, in_specs=in_specs, out_specs=(of_x, of_bias))(x, w, bias)
    dense = float64(whole().dequantize("float32"))
    parts = [dense.sum(1)] if by_rows else [dense[:, run].sum(1) for run in runs(N, 4)]
    check_sum_of_parts(float64(found[0]), np.tile(dense.sum(1), (M, 1)), 4 * parts, "float16")
    # Where rows are split each device adds bias, M rows of ones of it.
    np.testing.assert_array_equal(float64(found[1]), np.full(N, 4 * M if by_rows else M))


@pytest.mark.parametrize("of_w", [P(None, "model"), P("model")])
def test_stacks_in_shard_map(of_w: Any) -> None:
    devices, layers = LINE(), [weight("int4", 64, (K, N), seed) for seed in range(3)]
    x, stacked, by_rows = host((M, K)), stack(layers), of_w[0] is not None

    def on_each(x: jax.Array, stack: mc.QuantizedTensor) -> jax.Array:
        def step(_: None, layer: jax.Array) -> tuple[None, jax.Array]:
            y = (x @ stack[layer]).astype(jnp.float32)
            return None, jax.lax.psum(y, "model") if by_rows else y

        return jax.lax.scan(step, None, jnp.arange(3))[1]

    in_specs = P(None, "model") if by_rows else P(), partition_specs(stacked, devices, of_w)
    out_specs = P() if by_rows else P(None, None, "model")
    multiply = jax.jit(jax.shard_map(on_each, mesh=devices, in_specs=in_specs, out_specs=out_specs))
    for y, w in zip(multiply(x, jax.tree.map(np.asarray, stacked)), layers, strict=True):
        check(y.astype(x.dtype), x, w, shares=4 if by_rows else 1)


def test_a_program_of_shares_is_exported_from_shard_map() -> None:
    devices, of_w = LINE(), P(None, "model")
    x, w = jax.device_put(host((M, K)), NamedSharding(devices, P())), shard(whole(), devices, of_w)
    in_specs = P(), partition_specs(w, devices, of_w)
    multiply = jax.jit(jax.shard_map(lambda x, w: x @ w, mesh=devices, in_specs=in_specs, out_specs=of_w))
    exported = jax.export.export(multiply, platforms=("cpu", "cuda"), disabled_checks=export_checks)(x, w)
    program = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(jax.jit(program.call)(x, w), multiply(x, w))


def test_a_weight_that_every_device_has() -> None:
    devices, x = LINE(), host((M, K))
    multiply = jax.shard_map(lambda x, w: x @ w, mesh=devices, in_specs=(P("model"), P()), out_specs=P("model"))
    check(multiply(x, whole().to("numpy")), x, whole())
    closed = jax.shard_map(lambda x: x @ whole().to("numpy"), mesh=devices, in_specs=P("model"), out_specs=P("model"))
    check(jax.jit(closed)(x), x, whole())


# ---- what becomes of weights that are spread


def test_shares_are_a_tree_like_the_whole() -> None:
    x, w, _, _ = placed("columns")
    specs = partition_specs(whole(), LINE(), P(None, "model"))
    assert (specs.packed, specs.output_scales) == (P("model", None, None), P("model"))
    assert jax.tree.structure(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)) == jax.tree.structure(w)
    assert "packed=uint8(4, 4, 4352)" in repr(w)
    assert "K=512, N=256" in repr(specs)
    together = jax.device_put(w, jax.devices("cpu")[0])
    assert (together.unpack().codes == whole().unpack().codes).all()
    check(activations((M, K)) @ together, x, whole())


# ---- refusals


def of_shares(x: np.ndarray) -> jax.Array:
    """By three devices whose shares end inside a group, made without asking partition_specs."""
    w = weight("int4", 192, (768, 64))

    def on_each(x: jax.Array, packed: jax.Array) -> jax.Array:
        return jax.lax.psum(x @ mc.QuantizedTensor.of_parts(w.spec, {"packed": packed}), "model")

    in_specs = P(None, "model"), P(None, "model")
    return jax.shard_map(on_each, mesh=mesh(model=3), in_specs=in_specs, out_specs=P())(x, np.asarray(w.packed))


REFUSALS: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "columns for three devices": (
        lambda: shard(whole(), mesh(model=3), P(None, "model")),
        ValueError,
        ["N=256", "3 equal parts", "multiples of 64", "into 1, 2, 4 it can"],
    ),
    "rows for three devices": (
        lambda: shard(whole(), mesh(model=3), P("model")),
        ValueError,
        ["K=512", "3 equal parts", "multiples of 128", "into 1, 2, 4 it can"],
    ),
    "rows that cut groups": (
        lambda: shard(weight("int4", 256, (K, N)), LINE(), P("model")),
        ValueError,
        ["K=512", "4 equal parts", "multiples of 256", "into 1, 2 it can"],
    ),
    "an axis that is not there": (
        lambda: shard(whole(), SQUARE(), P(None, "tensor")),
        ValueError,
        ["axis 'tensor'", "data, model"],
    ),
    "three axes": (lambda: partition_specs(whole(), LINE(), P(None, None, "model")), ValueError, ["two axes, (K, N)"]),
    "values": (lambda: placed("columns")[1].dequantize(), mc.DeviceError, ["spread over 4 devices"]),
    "a share that cuts a group": (
        lambda: of_shares(host((M, 768))),
        ValueError,
        ["no share", "group_size=192", "384 inputs"],
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused_is_said_in_a_sentence(case: str) -> None:
    call, error, fragments = REFUSALS[case]
    with pytest.raises(error) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)


# ---- two processes


def test_two_processes_share_weights(tmp_path: Path) -> None:
    run_ranks(tmp_path, "cpu")
