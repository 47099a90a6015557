"""JAX on the CPU: products inside jit, vmap, grad, scan and checkpoint, weights as trees of arrays, refusals."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMATS, HALF, gaussian, rows
from jax_arrays import K, N, activations, check, check_gradient, check_sum, float64, weight

import marlin_cupy as mc
from marlin_cupy.integrations.jax import abstract, stack

every_format = pytest.mark.parametrize("name", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", HALF)
LAYERS = 3


@functools.cache
def layers(name: str = "int4", shape: tuple[int, int] = (K, N)) -> tuple[mc.QuantizedTensor, ...]:
    return tuple(weight(name, 64, shape, seed) for seed in range(LAYERS))


@functools.cache
def stacked(name: str = "int4", shape: tuple[int, int] = (K, N)) -> mc.QuantizedTensor:
    return stack(layers(name, shape))


def same(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def total(y: jax.Array) -> jax.Array:
    return y.astype(jnp.float32).sum()


# ---- products


@every_format
@every_dtype
def test_a_compiled_product_is_that_of_numpy(name: str, dtype: str) -> None:
    multiply = jax.jit(mc.matmul)
    for group_size in (16, -1):
        w, bias = weight(name, group_size), activations((N,), dtype)
        for M in (0, 1, 7):
            x = activations((M, K), dtype)
            check(multiply(x, w, bias), x, w, bias, case=f"M={M} with bias")
        check(multiply(x, w), x, w)
        check(mc.matmul(x, w, bias), x, w, bias, case="eagerly")


@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (2, 0, K), (1, 2, 1, K)])
def test_leading_axes(shape: tuple[int, ...]) -> None:
    x, w = activations(shape), weight()
    y = jax.jit(lambda x, w: x @ w)(x, w)
    assert isinstance(y, jax.Array)
    check(y, x, w)
    check(x @ w, x, w)
    dx = jax.jit(jax.grad(lambda x, w: total(x @ w)))(x, w)
    check_gradient(dx, jnp.ones((*shape[:-1], N), x.dtype), w)


def test_weights_of_every_shape() -> None:
    """Less than a slab, cut slabs, whole ones."""
    for shape in ((1, 1), (131, 67), (256, 192), (129, 64)):
        w, x = weight("uint4", 48, shape), activations((5, shape[0]))
        check(jax.jit(mc.matmul)(x, w), x, w, case=str(shape))
        dy = activations((5, shape[1]))
        check_gradient(jax.vjp(lambda x, w=w: x @ w, x)[1](dy)[0], dy, w, case=str(shape))


@pytest.mark.parametrize("held", ["numpy", "jax"])
def test_a_weight_is_a_constant_or_an_argument(held: str) -> None:
    x, w = activations((5, K)), weight().to(held)
    check(jax.jit(lambda x: x @ w)(x), x, w)
    check(jax.jit(lambda x, w: x @ w)(x, w), x, w)
    check(jax.jit(lambda x, tree: x @ tree["w"][0])(x, {"w": [w, None]}), x, w)
    dy = activations((5, N))
    check_gradient(jax.jit(lambda x, dy: jax.vjp(lambda x: x @ w, x)[1](dy)[0])(x, dy), dy, w)
    check(jax.vmap(lambda x: x @ w)(x), x, w)


def test_a_numpy_bias_is_not_taken_for_one_of_jax() -> None:
    with pytest.raises(TypeError, match="bias is a numpy array and x a jax array"):
        jax.jit(lambda x: mc.matmul(x, weight(), np.zeros(N, np.float16)))(activations((5, K)))


def test_programs_are_compiled_once_per_shape_and_description() -> None:
    traced = []

    @jax.jit
    def multiply(x: jax.Array, w: mc.QuantizedTensor) -> jax.Array:
        traced.append((x.shape, w.spec))
        return x @ w

    for w in layers():
        for M in (1, 5, 1):
            multiply(activations((M, K)), w)
    assert len(traced) == 2
    multiply(activations((5, K)), weight("int8"))
    assert len(traced) == 3


# ---- vmap


@every_dtype
def test_vmap_over_x_is_more_rows(dtype: str) -> None:
    x, w, bias = activations((2, 3, 4, K), dtype), weight(), activations((N,), dtype)
    multiply = functools.partial(mc.matmul, w=w, bias=bias)
    check(jax.jit(jax.vmap(multiply))(x), x, w, bias)
    check(jax.vmap(jax.vmap(jax.vmap(multiply)))(x), x, w, bias)
    check(jax.vmap(multiply, in_axes=2, out_axes=0)(x), jnp.moveaxis(x, 2, 0), w, bias)
    program = jax.make_jaxpr(jax.vmap(jax.vmap(multiply)))(x)
    assert " while[" not in str(program)
    assert " scan[" not in str(program)


def test_vmap_over_bias_and_over_weights() -> None:
    x, w, biases = activations((5, K)), weight(), activations((4, N))
    for y, bias in zip(jax.vmap(lambda bias: mc.matmul(x, w, bias))(biases), biases, strict=True):
        check(y, x, w, bias)
    for y, each in zip(jax.jit(jax.vmap(lambda w: x @ w))(stacked()), layers(), strict=True):
        check(y, x, each)
    xs = activations((LAYERS, 5, K))
    for y, one, each in zip(jax.vmap(mc.matmul)(xs, stacked()), xs, layers(), strict=True):
        check(y, one, each)
    for y, each in zip(jax.vmap(lambda layer: x @ stacked()[layer])(jnp.arange(LAYERS)), layers(), strict=True):
        check(y, x, each)


@every_dtype
def test_vmap_and_grad_in_either_order(dtype: str) -> None:
    x, w = activations((4, 3, K), dtype), weight("nf4")
    dy = jnp.ones((4, 3, N), x.dtype)
    check_gradient(jax.jit(jax.vmap(jax.grad(lambda x: total(x @ w))))(x), dy, w)
    check_gradient(jax.jit(jax.grad(lambda x: total(jax.vmap(lambda x: x @ w)(x))))(x), dy, w)
    xs = activations((LAYERS, 5, K), dtype)
    gradients = jax.vmap(jax.grad(lambda x, w: total(x @ w)))(xs, stacked())
    for dx, each in zip(gradients, layers(), strict=True):
        check_gradient(dx, jnp.ones((5, N), x.dtype), each)


def test_a_jacobian_is_the_weight() -> None:
    w = weight("int8")
    found = jax.jacrev(lambda x: x @ w)(activations((K,), "bfloat16"))
    check_gradient(found, jnp.eye(N, dtype="bfloat16"), w)


# ---- grad


@every_format
@every_dtype
def test_gradients_are_those_of_the_dense_product(name: str, dtype: str) -> None:
    for group_size in (16, -1):
        w, x, bias = weight(name, group_size), activations((7, K), dtype), activations((N,), dtype)
        dy = activations((7, N), dtype, seed=5)
        y, back = jax.vjp(lambda x, bias, w=w: mc.matmul(x, w, bias), x, bias)
        check(y, x, w, bias)
        dx, dbias = back(dy)
        check_gradient(dx, dy, w)
        check_sum(dbias, dy)
        assert dbias.dtype == bias.dtype


def test_a_gradient_with_respect_to_bias_alone() -> None:
    x, w, bias = activations((7, K)), weight(), activations((N,))
    dbias = jax.jit(jax.grad(lambda bias, w: total(mc.matmul(x, w, bias))))(bias, w)
    check_sum(dbias, jnp.ones((7, N), x.dtype))


def test_unused_products_have_zero_gradients() -> None:
    x, w = activations((7, K)), weight()
    dx = jax.grad(lambda x: total(x) + 0 * total(jax.lax.stop_gradient(x) @ w))(x)
    assert same(dx, jnp.ones_like(x))
    assert not jax.grad(lambda x: total(jnp.zeros_like(x @ w)))(x).any()


def test_a_stopped_weight_may_be_among_the_differentiated() -> None:
    x, w = activations((7, K)), weight()

    def loss(tree: Any) -> jax.Array:
        return total(tree["x"] @ jax.lax.stop_gradient(tree["w"]))

    found = jax.grad(loss, allow_int=True)({"x": x, "w": w})
    check_gradient(found["x"], jnp.ones((7, N), x.dtype), w)
    assert found["w"].packed.dtype == jax.dtypes.float0


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.nothing_saveable])
def test_checkpoint(policy: Any) -> None:
    w, x = weight(shape=(K, K)), activations((4, K))

    def block(x: jax.Array, w: mc.QuantizedTensor) -> jax.Array:
        return jnp.tanh(x @ w * np.float16(1 / 16))

    def loss(layer: Any, x: jax.Array, w: mc.QuantizedTensor) -> jax.Array:
        return total(layer(layer(x, w), w))

    found = jax.jit(jax.grad(functools.partial(loss, jax.checkpoint(block, policy=policy))))(x, w)
    expected = jax.jit(jax.grad(functools.partial(loss, block)))(x, w)
    difference = np.linalg.norm(float64(found) - float64(expected))  # some roundings, which need not be the same
    assert difference <= 8 * 2.0**-11 * np.linalg.norm(float64(expected))


# ---- stacks


@every_format
def test_scan_over_slices_and_over_layers_in_place(name: str) -> None:
    weights, x = layers(name, (K, K)), activations((5, K))

    def step(x: jax.Array, w: mc.QuantizedTensor) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        y = x @ w
        return y * np.float16(1 / 32), (x, y)

    def sliced(x: jax.Array, stack: mc.QuantizedTensor) -> Any:
        return jax.lax.scan(step, x, stack)[1]

    def in_place(x: jax.Array, stack: mc.QuantizedTensor) -> Any:
        return jax.lax.scan(lambda x, layer: step(x, stack[layer]), x, jnp.arange(LAYERS))[1]

    for program in (sliced, in_place):
        for one, y, w in zip(*jax.jit(program)(x, stacked(name, (K, K))), weights, strict=True):
            check(y, one, w, case=program.__name__)


def test_scales_of_outputs_are_a_part_of_stacks_and_trees() -> None:
    weights = [weight("fp8_e4m3", -1, seed=seed) for seed in range(LAYERS)]
    together, x = stack(weights), activations((5, K))
    assert together.output_scales is not None
    assert together.output_scales.shape == (LAYERS, 128)
    in_place = jax.jit(lambda x, w: jax.lax.map(lambda layer: x @ w[layer], jnp.arange(LAYERS)))(x, together)
    batched = jax.jit(jax.vmap(lambda w: x @ w))(together)
    dx = jax.vmap(jax.grad(lambda x, w: total(x @ w)), (None, 0))(x, together)
    for layer, w in enumerate(weights):
        for y in (in_place[layer], batched[layer], mc.matmul(x, together[layer])):
            check(y, x, w)
        check_gradient(dx[layer], jnp.ones((5, N), x.dtype), w)
    shapes = abstract(jax.ShapeDtypeStruct((K, N), jnp.float32), "fp8_e4m3", -1)
    assert jax.tree.structure(shapes) == jax.tree.structure(weights[0])
    for shape, part in zip(jax.tree.leaves(shapes), jax.tree.leaves(weights[0]), strict=True):
        assert (shape.shape, shape.dtype) == (part.shape, part.dtype)


def test_gradients_through_a_scan() -> None:
    x, scale = activations((5, K)), np.float16(1 / 32)

    def in_place(x: jax.Array, stack: mc.QuantizedTensor) -> jax.Array:
        return total(jax.lax.scan(lambda x, i: (x @ stack[i] * scale, None), x, jnp.arange(LAYERS))[0])

    def sliced(x: jax.Array, stack: mc.QuantizedTensor) -> jax.Array:
        return total(jax.lax.scan(lambda x, w: (x @ w * scale, None), x, stack)[0])

    dy = jnp.ones((5, K), jnp.float32)
    for w in reversed(layers(shape=(K, K))):
        dy = dy @ w.dequantize("float32").T * scale
    for program in (in_place, sliced):
        dx = jax.jit(jax.grad(program))(x, stacked(shape=(K, K)))
        # Each of the steps rounds twice; roundings have nothing to do with one another.
        error = np.linalg.norm(float64(dx) - float64(dy)) / np.linalg.norm(float64(dy))
        assert error <= 2.0**-11 * (2 * LAYERS) ** 0.5


def test_a_traced_number_of_a_layer() -> None:
    """As JAX indexes arrays: from the end where negative, and the nearest where there is none."""
    x, dy = activations((5, K)), jnp.ones((5, N), jnp.float16)
    multiply = jax.jit(lambda x, w, i: x @ w[i])
    gradient = jax.jit(jax.grad(lambda x, w, i: total(x @ w[i])))
    for number, layer in ((0, 0), (2, 2), (-1, 2), (-3, 0), (7, 2), (-9, 0)):
        check(multiply(x, stacked(), number), x, layers()[layer], case=f"layer {number}")
        check_gradient(gradient(x, stacked(), number), dy, layers()[layer], case=f"layer {number}")
        assert np.asarray(jnp.arange(LAYERS)[jnp.int32(number)]) == layer
    check(multiply(x, stacked(), jnp.uint8(1)), x, layers()[1])


@pytest.mark.parametrize("number", [0, 2, -1, -3, np.int64(1), jnp.uint8(2)])
def test_a_number_of_a_layer(number: Any) -> None:
    x = activations((5, K))
    check(x @ stacked()[number], x, layers()[int(number)])
    check(jax.jit(lambda x, w: x @ w[number])(x, stacked()), x, layers()[int(number)])


def test_stacks_are_made_of_weights_from_anywhere() -> None:
    made = stack([layers()[0], layers()[1].to("numpy")])
    assert made.packed.shape == (2, *layers()[0].packed.shape)
    assert made.spec == layers()[0].spec
    x = activations((5, K))
    check(x @ made[1], x, layers()[1])
    assert same(made.output_scales[1], layers()[1].output_scales)


# ---- weights as trees of arrays


def test_trees() -> None:
    x, w = activations((5, K)), weight()
    leaves, structure = jax.tree.flatten(w)
    assert [(each.shape, each.dtype.name) for each in leaves] == [((2, 2, 4352), "uint8"), ((128,), "float32")]
    check(x @ jax.tree.unflatten(structure, leaves), x, w)
    paths = jax.tree_util.tree_flatten_with_path({"up": w})[0]
    assert [jax.tree_util.keystr(path) for path, _ in paths] == ["['up'].packed", "['up'].output_scales"]
    assert jax.tree.structure(w) == jax.tree.structure(layers()[0])
    assert jax.tree.structure(w) != jax.tree.structure(weight("nf4"))
    doubled = jax.tree.map(lambda *parts: jnp.stack(parts), w, w)
    check(x @ doubled[1], x, w)
    assert len(jax.tree.leaves(w.to("numpy"))) == 1


def test_shapes_without_values() -> None:
    x, w = activations((5, K)), weight()
    y, same_kind = jax.eval_shape(lambda x, w: (x @ w, w), x, w)
    assert (y.shape, y.dtype) == ((5, N), x.dtype)
    assert isinstance(same_kind, mc.QuantizedTensor)
    assert same_kind.spec == w.spec
    assert same_kind.packed.shape == w.packed.shape
    described = jax.tree.map(lambda part: jax.ShapeDtypeStruct(part.shape, part.dtype), w)
    assert jax.eval_shape(mc.matmul, x, described).shape == (5, N)
    assert "K=200, N=70" in repr(described)
    check(jax.jit(mc.matmul).lower(x, described).compile()(x, w), x, w)


def test_device_put_and_donation() -> None:
    x, w = activations((5, K)), weight()
    for where in (jax.devices("cpu")[0], jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])):
        moved = jax.device_put(w, where)
        assert moved.device == w.device
        check(x @ moved, x, w)
    assert jax.block_until_ready(w) is not None
    owned = jax.tree.map(jnp.copy, w)
    update = jax.jit(lambda x, w: (x @ w, jax.tree.map(lambda part: part, w)), donate_argnums=1)
    for _ in range(3):
        y, given = update(x, owned)
        assert owned.packed.is_deleted()
        check(y, x, w)
        owned = given
    assert same(owned.packed, w.packed)


def test_weights_are_results_and_choices_of_programs() -> None:
    x, (first, second, _) = activations((5, K)), layers()
    choose = jax.jit(lambda which, a, b: jax.tree.map(lambda a, b: jnp.where(which, a, b), a, b))
    for which, expected in ((True, first), (False, second)):
        found = choose(which, first, second)
        assert isinstance(found, mc.QuantizedTensor)
        check(x @ found, x, expected)
        assert same(found.dequantize(), expected.dequantize())
    y = jax.lax.cond(True, lambda x: x @ first, lambda x: x @ second, x)
    check(y, x, first)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies(how: str) -> None:
    x, w = activations((5, K)), weight("uint4")
    found = COPIES[how](w)
    assert isinstance(found.packed, jax.Array)
    assert found.spec == w.spec
    assert same(x @ found, x @ w)
    assert same(found.dequantize(), w.dequantize())
    for layer in (1, -1):
        assert same(x @ COPIES[how](stacked())[layer], x @ stacked()[layer])
        assert same(x @ COPIES[how](stacked()[layer]), x @ stacked()[layer])


def test_copies_of_what_is_traced() -> None:
    x, w = activations((5, K)), weight()
    check(jax.jit(lambda x, w: x @ copy.copy(w))(x, w), x, w)


_FIRST_IN_A_PROCESS = """
import pickle, sys
{first}
import numpy as np
import marlin_cupy as mc
{made}
import jax
x = jax.device_put(np.ones((2, 64), np.float16), jax.devices("cpu")[0])
y = jax.jit(lambda x, w: x @ w)(x, w)
np.testing.assert_allclose(np.asarray(y, np.float32), 64, rtol=1 / 250)  # half a step of int8 is 1 / 255
"""


@pytest.mark.parametrize(
    ("first", "made"),
    [
        ("import jax", "w = mc.quantize(np.ones((64, 64), np.float16), 'int8')"),
        ("import jax", "w = mc.load(sys.argv[1])"),
        ("", "w = mc.load(sys.argv[1])\nimport marlin_cupy.integrations.jax"),
        ("", "w = pickle.load(open(sys.argv[2], 'rb'))[0]"),
    ],
    ids=["quantized", "loaded", "loaded before JAX", "unpickled"],
)
def test_the_first_weight_of_a_process_is_a_tree(first: str, made: str, tmp_path: Path) -> None:
    w = mc.quantize(np.ones((64, 64), np.float16), "int8")
    w.save(tmp_path / "saved")
    stacked = stack([w, w])
    (tmp_path / "pickled").write_bytes(pickle.dumps(stacked))
    program = _FIRST_IN_A_PROCESS.format(first=first, made=made)
    environment = {**os.environ, "PYTHONPATH": str(Path(mc.__file__).parents[1])}
    command = [sys.executable, "-c", program, str(tmp_path / "saved"), str(tmp_path / "pickled")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_files(tmp_path: Path) -> None:
    x, w = activations((5, K)), weight("nf4")
    w.save(tmp_path / "w")
    found = mc.load(tmp_path / "w")
    assert isinstance(found.packed, np.ndarray)
    assert same(x @ found.to("jax"), x @ w)
    program_made = jax.jit(lambda w: jax.tree.map(lambda part: part + 0, w))(w)
    program_made.save(tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == (tmp_path / "w").read_bytes()


def test_what_is_printed() -> None:
    w = weight()
    assert repr(w).startswith("QuantizedTensor(int4, K=200, N=70, group_size=64, scale_dtype=float16, device=cpu")
    printed = []
    jax.jit(lambda w: printed.append(repr(w)))(w)
    assert printed[0].endswith("packed=uint8(2, 2, 4352))")
    assert repr(stacked()).endswith("packed=uint8(3, 2, 2, 4352))")
    assert "K=200, N=70" in repr(stacked()[1])
    assert "K=200, N=70" in repr(jax.tree.map(lambda part: None, w))


# ---- refusals


def of_share(x: jax.Array) -> jax.Array:
    """With half of the inputs, as a device of a mesh would have it, which ends inside a group."""
    w = weight("int4", 192, (256, 64))
    return x @ mc.QuantizedTensor.of_parts(w.spec, {**w.parts, "packed": w.packed[:, :1]})


REFUSALS: dict[str, tuple[Callable[[Any, Any], Any], type[Exception], list[str]]] = {
    "the weight's gradient": (
        lambda x, w: jax.grad(lambda w: total(x @ w), allow_int=True)(w),
        mc.UnsupportedError,
        ["gradient with respect to a quantized weight", "x and bias", "argnums"],
    ),
    "a stack": (lambda x, w: x @ stacked(), ValueError, ["(3, 2, 2, 4352)", "a stack of weights", "w[i]"]),
    "an index beyond": (lambda x, w: x @ stacked()[3], IndexError, ["weight 3", "a stack of 3"]),
    "an index before": (lambda x, w: x @ stacked()[-4], IndexError, ["weight -4", "a stack of 3"]),
    "a fraction": (lambda x, w: x @ stacked()[1.0], TypeError, ["1.0", "use an integer"]),
    "a truth": (lambda x, w: x @ stacked()[True], TypeError, ["True", "use an integer"]),
    "several numbers": (lambda x, w: x @ stacked()[np.arange(2)], TypeError, ["use an integer"]),
    "an index of one weight": (lambda x, w: w[0], TypeError, ["is one weight", "only a stack"]),
    "an index of a layer": (lambda x, w: stacked()[0][0], TypeError, ["is one weight", "only a stack"]),
    "K": (lambda x, w: x[:, 1:] @ w, ValueError, ["(5, 199)", "K=200, N=70", "(..., 200)"]),
    "a scalar": (lambda x, w: x[0, 0] @ w, ValueError, ["shape ()", "(..., 200)"]),
    "float32": (lambda x, w: x.astype("float32") @ w, ValueError, ["float32", "float16 or bfloat16"]),
    "out": (lambda x, w: mc.matmul(x, w, out=x), TypeError, ["out", "jax", "what matmul returns"]),
    "bias shape": (lambda x, w: mc.matmul(x, w, x[0]), ValueError, ["float16(200,)", "float16(70,)"]),
    "bias dtype": (lambda x, w: mc.matmul(x, w, jnp.zeros(N)), ValueError, ["bias is float32", "float16(70,)"]),
    "no weight": (lambda x, w: mc.matmul(x, x.T), TypeError, ["QuantizedTensor"]),
    "a share that cuts a group": (
        lambda x, w: of_share(x[:, :128]),
        ValueError,
        ["(1, 1, ", "no share of (1, 2, ", "group_size=192", "384 inputs"],
    ),
}
#: What needs values, which a traced weight has not.
VALUES: dict[str, Callable[[Any], Any]] = {
    "dequantize": lambda w: w.dequantize(),
    "unpack": lambda w: w.unpack().codes,
    "columns": lambda w: w.columns(0, 64),
    "to": lambda w: w.to("numpy"),
    "save": lambda w: w.save("nowhere"),
}


def one_sentence(error: BaseException) -> None:
    assert str(error).endswith(".")
    assert "\n" not in str(error)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused_is_said_in_a_sentence(case: str, traced: bool) -> None:
    call, error, fragments = REFUSALS[case]
    with pytest.raises(error) as caught:
        (jax.jit(call) if traced else call)(activations((5, 200)), weight())
    for fragment in fragments:
        assert fragment in str(caught.value)
    one_sentence(caught.value)


@pytest.mark.parametrize("case", VALUES)
def test_what_needs_values_says_so(case: str) -> None:
    with pytest.raises(mc.UnsupportedError, match=r"traced by jax\.jit") as caught:
        jax.jit(VALUES[case])(weight())
    one_sentence(caught.value)
    with pytest.raises(ValueError, match="a stack of weights") as stacks:
        VALUES[case](stacked())
    one_sentence(stacks.value)


def test_stacks_are_of_equal_weights() -> None:
    with pytest.raises(ValueError, match=r"int4 \(200, 70\) group_size=64, nf4 .* one shape, format"):
        stack([weight(), weight("nf4")])
    with pytest.raises(ValueError, match="ws holds nothing"):
        stack([])
    with pytest.raises(TypeError, match="ws holds a ndarray"):
        stack([np.zeros((2, 2))])  # type: ignore[list-item]


def test_an_indexed_stack_is_a_weight_for_all_that_is_not_compiled() -> None:
    ws = [mc.quantize(gaussian(128, 64, seed=seed)) for seed in range(3)]
    second, x = stack(ws)[1], rows((5, 128), seed=1, dtype="float16")
    np.testing.assert_array_equal(np.asarray(second.dequantize("float32")), ws[1].dequantize("float32"))
    np.testing.assert_array_equal(second.to("numpy").packed, ws[1].packed)
    np.testing.assert_array_equal(mc.matmul(x, second), mc.matmul(x, ws[1]))
    assert mc.explain((5, 128), "float16", second).kernel == "reference"


def test_second_derivatives() -> None:
    """The Hessian of a function of a product is that of the dense one."""
    w, x = weight("int4", 64, (64, 64)), activations((64,)) * np.float16(0.1)
    dense = jnp.asarray(np.asarray(w.dequantize("float32")))

    def loss(y: jax.Array) -> jax.Array:
        return jnp.square(jnp.tanh(y.astype(jnp.float32) / 8)).sum()

    found = jax.jit(jax.jacrev(jax.grad(lambda x: loss(x @ w))))(x)
    exact = jax.jacrev(jax.grad(lambda x: loss(x @ dense)))(x.astype(jnp.float32))
    # y, both cotangents and both gradients are rounded to float16, once each
    assert np.linalg.norm(float64(found) - float64(exact)) <= 5 * 2.0**-11 * np.linalg.norm(float64(exact))


def test_weights_of_numpy_go_to_the_default_device_where_jax_was_told_to_leave_the_cpu_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(backend: str) -> list[Any]:
        raise RuntimeError(f"Unknown backend {backend}. Available backends are ['cuda']")

    monkeypatch.setattr(jax, "local_devices", none)
    w = mc.quantize(gaussian(128, 64, seed=1))
    with jax.default_device(jax.devices()[1]):
        found = w.to("jax").packed
    assert found.devices() == {jax.devices()[1]}
    np.testing.assert_array_equal(np.asarray(found), w.packed)
