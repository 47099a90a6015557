"""Products with 4-bit weights inside JAX programs: jit, scan over a stack in place, vmap, grad, spread over devices.

    pip install "marlin_cupy[jax]"                  # for a GPU also marlin_cupy[cuda13] and jax[cuda13]
    python examples/jax_linear.py                   # on every GPU that JAX has, else on the CPU
    python examples/jax_linear.py --devices 4       # four devices out of one CPU

A block of a transformer's linear layers, 1024 wide, with random weights, four of them in a stack. Expect the result of
one to be about 0.08 from that of float16 (what round to nearest in 4 bits costs here), and everything after it to agree
with the eager call but for roundings: below 5e-3, in gradients 2e-2, where float16 is summed in another order. Spread
over devices the program gathers nothing and adds up once. Every result is checked: the exit code is 1 where one is
wrong. On two CPU cores it takes about 8 seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import marlin_cupy as mc
from marlin_cupy.integrations.jax import shard, stack

WIDTH, INNER, LAYERS, ROWS = 1024, 2048, 4, 8


def block(x: jax.Array, up: mc.QuantizedTensor, down: mc.QuantizedTensor, bias: jax.Array) -> jax.Array:
    """Up and down with a nonlinearity between. x: [..., WIDTH]; as it."""
    return x + mc.matmul(jax.nn.silu(mc.matmul(x, up)), down, bias)


def layers(x: jax.Array, ups: mc.QuantizedTensor, downs: mc.QuantizedTensor, bias: jax.Array) -> jax.Array:
    """Blocks one after the other; on a GPU each kernel reads its layer of the stack in place."""

    def step(y: jax.Array, layer: jax.Array) -> tuple[jax.Array, None]:
        return block(y, ups[layer], downs[layer], bias), None

    return jax.lax.scan(step, x, jnp.arange(LAYERS))[0]


def distance(found: jax.Array, expected: jax.Array) -> float:
    """Relative, in the Frobenius norm."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, metavar="N", help="compute on N devices made out of the CPU")
    asked = parser.parse_args(arguments).devices
    if asked:  # before JAX has looked for devices
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", asked)
    devices = jax.devices()
    print(f"{len(devices)} x {devices[0].device_kind}")
    right = True

    def check(what: str, value: float, least: float, most: float) -> None:
        nonlocal right
        good = least <= value <= most
        right = right and good
        print(f"{what:<52} {value:8.3g}   {'' if good else f'WRONG: expected {least:g} to {most:g}'}".rstrip())

    keys = iter(jax.random.split(jax.random.key(0), 2 * LAYERS + 2))
    x = jax.random.normal(next(keys), (ROWS, WIDTH), jnp.float16)
    bias = jax.random.normal(next(keys), (WIDTH,), jnp.float16)
    dense = [
        tuple(
            jax.random.normal(next(keys), shape, jnp.float16) * shape[0] ** -0.5
            for shape in ((WIDTH, INNER), (INNER, WIDTH))
        )
        for _ in range(LAYERS)
    ]
    ups, downs = ([mc.quantize(pair[side], "int4").to("jax") for pair in dense] for side in (0, 1))
    up, down = ups[0], downs[0]

    def change(y: jax.Array) -> jax.Array:  # without x, which any weights would leave
        return y - x

    eager = block(x, up, down, bias)
    exact = jax.nn.silu(x @ dense[0][0]) @ dense[0][1] + bias
    check("one block: distance from float16", distance(change(eager), exact), 0.03, 0.3)
    check("jax.jit: from eager", distance(jax.jit(block)(x, up, down, bias), eager), 0, 5e-3)
    check(
        "jax.vmap: from eager",
        distance(jax.vmap(block, in_axes=(0, None, None, None))(x[:, None], up, down, bias)[:, 0], eager),
        0,
        5e-3,
    )

    expected = x
    for each in zip(ups, downs, strict=True):
        expected = block(expected, *each, bias)
    found = jax.jit(layers)(x, stack(ups), stack(downs), bias)
    check("jax.lax.scan over a stack: from a loop", distance(found, expected), 0, 5e-3)

    def loss(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return jnp.square(block(x, up, down, bias).astype(jnp.float32)).mean() * 1000

    gradient = jax.jit(jax.grad(loss))(x, up, down)
    as_dense = [jnp.asarray(mc.dequantize(w, "float32")) for w in (up, down)]
    wanted = jax.grad(
        lambda x: jnp.square(x + jax.nn.silu(x @ as_dense[0]) @ as_dense[1] + bias.astype(jnp.float32)).mean() * 1000
    )(x.astype(jnp.float32))
    check("jax.grad: from that of the dense float32 block", distance(gradient, wanted), 0, 2e-2)

    # Column parallel and then row parallel: what stands between is never gathered, sums are added up once.
    mesh = Mesh(np.asarray(devices), ("model",))
    columns = shard(up, mesh, PartitionSpec(None, "model"))
    rows = shard(down, mesh, PartitionSpec("model", None))
    everywhere = NamedSharding(mesh, PartitionSpec())
    operands = jax.device_put(x, everywhere), columns, rows, jax.device_put(bias, everywhere)
    program = jax.jit(block, out_shardings=everywhere).lower(*operands).compile()
    check("spread over all devices: from eager", distance(program(*operands), eager), 0, 5e-3)
    text = program.as_text()
    check("gathers in the spread program", text.count("all-gather("), 0, 0)
    if len(devices) > 1:
        check(
            "sums over devices in it", sum(text.count(f"{name}(") for name in ("all-reduce", "all-reduce-start")), 1, 1
        )
    print("correct" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
