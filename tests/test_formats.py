"""What codes mean: every registered format, against brute force."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import FORMATS, GROUP_SIZES, HALF, gaussian, gaussian_error, ways
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import marlin_cupy as mc
from marlin_cupy import formats, packing, scalars
from marlin_cupy.formats import CODES, SCALE, ZERO_POINT, Bits
from marlin_cupy.formats.format import Format, Params
from marlin_cupy.formats.integer import nibble_planes
from marlin_cupy.scalars import E8M0, F16, F32, HALVES, Scalar

every_format = pytest.mark.parametrize("name", FORMATS)
#: Every type that scales of a format can have, in groups of any size that it has.
every_scale_dtype = pytest.mark.parametrize(
    ("name", "scale_dtype"),
    dict.fromkeys((name, scale_dtype) for name, _, scale_dtype in ways(64, -1)),
)


def codes_of(format: Format) -> np.ndarray:
    """All codes that stand for weights."""
    return np.setdiff1d(np.arange(format.max_code + 1), FORMATS[format.name].no_codes).astype(np.uint8)


def random_codes(format: Format, shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(codes_of(format), shape)


def values_of_codes(format: Format, params: Params) -> np.ndarray:
    """The value of every code in every group: (codes, groups, columns)."""
    groups, columns = params[SCALE].shape
    codes = np.broadcast_to(codes_of(format)[None, :, None], (groups, codes_of(format).size, columns))
    return format.decode(codes, params).transpose(1, 0, 2)


def levels_of(format: Format) -> np.ndarray:
    """The values of its codes under a scale of 1 and a zero point of 0, in order."""
    ones = {SCALE: np.ones((1, 1), np.float32), ZERO_POINT: np.zeros((1, 1), np.float32)}
    return np.sort(values_of_codes(format, ones)[:, 0, 0])


def random_params(format: Format, groups: int, columns: int, scale: Scalar, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    params = {SCALE: scale.round(rng.uniform(0.01, 3, (groups, columns)).astype(np.float32))}
    if ZERO_POINT in format.params:
        params[ZERO_POINT] = rng.integers(0, format.max_code + 1, (groups, columns)).astype(np.float32)
    return params


def check_nearest(format: Format, weights: np.ndarray, codes: np.ndarray, params: Params) -> np.ndarray:
    """Each code is one of the nearest. Returns what float32 arithmetic may be off by."""
    decoded = format.decode(codes, params)
    assert decoded.dtype == np.float32
    nearest = np.abs(values_of_codes(format, params)[:, :, None, :] - weights).min(axis=0)
    fuzz = 4 * F32.roundoff * (np.abs(weights) + np.abs(decoded))  # of w * (1 / scale), and of float32 here
    fuzz = fuzz + format.largest_value * 2.0**-126 + 1e-45  # below that, scales are 0
    np.testing.assert_array_less(np.abs(decoded - weights), nearest + fuzz)
    return fuzz


def check_rounding(format: Format, weights: np.ndarray, scale: Scalar) -> None:
    """Absmax quantization: codes in range, each the nearest, no weight off by more than half the widest step."""
    codes, params = format.quantize(weights, scale, "absmax", {})
    assert codes.dtype == np.uint8
    assert codes.shape == weights.shape
    assert np.isin(codes, codes_of(format)).all()
    fuzz = check_nearest(format, weights, codes, params)

    # A scale rounded down leaves the largest weight outside: by the range, at most 2 * absmax, times the rounding.
    absmax = np.abs(weights).max(axis=1, keepdims=True)
    if scale == E8M0:
        outside = FORMATS[format.name].clipped * params[SCALE][:, None, :]
    else:
        outside = 2 * absmax * scale.roundoff + 2.0**-25 * max(format.max_code, format.largest_value) * (scale == F16)
    error = np.abs(format.decode(codes, params) - weights)
    half_step = params[SCALE][:, None, :] * np.diff(levels_of(format)).max() / 2
    np.testing.assert_array_less(error, half_step + outside + fuzz)


def test_every_registered_format_has_a_row_and_every_row_a_format() -> None:
    assert sorted(FORMATS) == formats.names()


@every_format
def test_the_format_describes_itself(name: str) -> None:
    format = formats.get(name)
    assert format.name == name
    assert format.source
    assert format.default_group_size in (-1, *range(16, 1025, 16))
    assert format.params[0] == SCALE
    assert format.zero_code in codes_of(format)
    assert format.max_code == 2**format.bits - 1
    largest = np.abs(levels_of(format)).max()
    assert format.largest_value == 2.0 ** np.ceil(np.log2(largest))
    assert all(values[0] == min(values, key=values.index) for values in format.options.values())


@every_format
def test_the_row_says_all_that_the_format_has(name: str) -> None:
    """What the suites iterate is what users can ask for."""
    format, row = formats.get(name), FORMATS[name]

    def has(group_size: int, options: dict[str, str]) -> bool:
        try:
            format.check_group_size(group_size)
            format.check_options(group_size, options)
        except ValueError:
            return False
        return True

    assert row.groups(*GROUP_SIZES) == tuple(size for size in GROUP_SIZES if has(size, {}))
    assert row.group(format.default_group_size) == format.default_group_size
    for group_size in row.groups(*GROUP_SIZES):
        assert format.has_output_scales(group_size) == (group_size in row.output_scales)
        for scale in row.scales(group_size):
            assert format.checked_scale_dtype(scale, "", group_size) == scale
        others = {*(each.name for each in (*HALVES, F32, E8M0))} - {*row.scales(group_size)}
        for scale in others:
            with pytest.raises(ValueError, match=rf"^scale_dtype is '{scale}'; scales of {name} are .*\.$"):
                format.checked_scale_dtype(scale, "", group_size)
    chosen = [{option: value} for option, values in format.options.items() for value in values[1:]]
    offered = [(size, options) for options in chosen for size in GROUP_SIZES if has(size, options)]
    assert list(row.options) == offered


@every_format
def test_fields_say_what_a_slab_holds(name: str) -> None:
    format, row = formats.get(name), FORMATS[name]
    for group_size in row.groups(*GROUP_SIZES):
        scale = scalars.by_name(row.scales(group_size)[0])
        *params, codes = format.fields(group_size, scale)
        assert (codes.name, codes.scalar, codes.per, codes.planes) == (CODES, format.codes, 1, format.planes)
        stored = [] if group_size in row.output_scales else [*format.params]
        assert [(each.name, each.scalar, each.per) for each in params] == [(key, scale, group_size) for key in stored]


@every_format
def test_codes_that_stand_for_no_weight_are_refused(name: str) -> None:
    format = formats.get(name)
    format.check_codes(codes_of(format)[:, None])
    beyond = [format.max_code + 1, 255] if format.bits < 8 else []
    for code in (*FORMATS[name].no_codes, *beyond):
        with pytest.raises(ValueError, match=rf"{code}|NaN.*{name}\.$"):
            format.check_codes(np.asarray([[0], [code]], np.uint8))


@every_format
def test_a_taken_name_is_not_registered_again(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*registered already"):
        formats.register(formats.get(name))


@pytest.mark.parametrize(("name", "group_size", "scale_dtype"), ways(16, 64, 128, 384))
def test_absmax_codes_are_the_nearest_within_half_a_step(name: str, group_size: int, scale_dtype: str) -> None:
    size = 384 if group_size == -1 else group_size
    weights = gaussian(3 * size, 37, seed=size).reshape(3, size, 37)
    check_rounding(formats.get(name), weights, scalars.by_name(scale_dtype))


@every_scale_dtype
@given(data=st.data())
def test_absmax_codes_are_the_nearest_for_any_weights(name: str, scale_dtype: str, data: st.DataObject) -> None:
    weights = data.draw(
        hnp.arrays(
            np.float32,
            st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 3)),
            elements=st.floats(-30000, 30000, width=32),
        )
    )
    check_rounding(formats.get(name), weights, scalars.by_name(scale_dtype))


@every_scale_dtype
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_scales_are_rounded_before_codes_are_chosen(name: str, scale_dtype: str, search: str) -> None:
    """What is stored is what the codes were chosen for: rounding the parameters again changes nothing."""
    weights = gaussian(256, 33, seed=1).reshape(2, 128, 33)
    scale = scalars.by_name(scale_dtype)
    codes, params = formats.get(name).quantize(weights, scale, search, {})
    assert list(params) == list(formats.get(name).params)
    for values in params.values():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(scale.round(values), values)
    np.testing.assert_array_equal(formats.get(name).encode(weights, params), codes)


@every_scale_dtype
def test_representable_weights_are_exact(name: str, scale_dtype: str) -> None:
    format = formats.get(name)
    params = random_params(format, 3, 5, scalars.by_name(scale_dtype), seed=2)
    codes = random_codes(format, (3, 512, 5), seed=3)
    np.testing.assert_array_equal(format.encode(format.decode(codes, params), params), codes)


@every_scale_dtype
def test_jax_decodes_to_the_same_bits(name: str, scale_dtype: str) -> None:
    """Programs of JAX hold this definition."""
    format = formats.get(name)
    params = random_params(format, 3, 5, scalars.by_name(scale_dtype), seed=2)
    codes = random_codes(format, (3, 512, 5), seed=3)
    found = format.decode(jnp.asarray(codes), {key: jnp.asarray(value) for key, value in params.items()})
    np.testing.assert_array_equal(np.asarray(found).view(np.uint32), format.decode(codes, params).view(np.uint32))


@every_scale_dtype
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_groups_of_zeros_stay_zero(name: str, scale_dtype: str, search: str) -> None:
    format, scale = formats.get(name), scalars.by_name(scale_dtype)
    weights = gaussian(128, 4, seed=4).reshape(2, 64, 4)
    weights[0, :, :2] = 0
    weights[0, ::3, 0] = -0.0
    codes, params = format.quantize(weights, scale, search, {})
    assert not scale.to_bits(params[SCALE])[0, :2].any()
    assert not format.decode(codes, params)[0, :, :2].any()
    assert format.decode(codes, params)[0, :, 2:].any()


@every_format
def test_padding_stands_for_zero(name: str) -> None:
    format = formats.get(name)
    params = {key: np.zeros((1, 1), np.float32) for key in format.params}
    assert format.decode(np.full((1, 1, 1), format.zero_code, np.uint8), params).item() == 0.0


@every_scale_dtype
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e-30, 1e-9])
def test_weights_too_small_for_a_scale_become_zero_or_stay_close(name: str, scale_dtype: str, size: float) -> None:
    """No overflow of 1 / scale on the way, no code from a NaN."""
    weights = np.asarray([[[size], [0.0], [-size]]], dtype=np.float32)
    format = formats.get(name)
    codes, params = format.quantize(weights, scalars.by_name(scale_dtype), "mse", {})
    decoded = format.decode(codes, params)
    assert decoded[0, 1, 0] == 0
    assert np.abs(decoded - weights).max() <= 1.001 * np.float32(size)


@every_scale_dtype
def test_the_search_never_loses_to_absmax_and_wins_with_outliers(name: str, scale_dtype: str) -> None:
    format = formats.get(name)
    weights = gaussian(512, 65, seed=5).reshape(4, 128, 65)
    weights[:, 7, :] *= 3

    def squared_error(search: str) -> np.ndarray:
        codes, params = format.quantize(weights, scalars.by_name(scale_dtype), search, {})
        return ((format.decode(codes, params) - weights) ** 2).sum(axis=1)

    absmax, mse = squared_error("absmax"), squared_error("mse")
    assert (mse <= absmax).all()
    assert mse.sum() < absmax.sum()


@every_scale_dtype
def test_the_search_takes_the_best_of_what_it_tries(name: str, scale_dtype: str) -> None:
    """Against all of format.shrinks one after the other; the first of the best, absmax before the others."""
    format, scale = formats.get(name), scalars.by_name(scale_dtype)
    weights = gaussian(128, 9, seed=8).reshape(2, 64, 9)
    weights[:, 7] = 3.9  # just below a power of two, where scales of mxfp4 change
    assert format.shrinks[0] == 1
    errors, tried = [], []
    for shrink in format.shrinks:
        params = {key: scale.round(value) for key, value in format.fit(weights, shrink).items()}
        codes = format.encode(weights, params)
        errors.append(((format.decode(codes, params) - weights) ** 2).sum(axis=1))
        tried.append(params[SCALE])
    best = np.argmin(errors, axis=0)
    _, params = format.quantize(weights, scale, "mse", {})
    np.testing.assert_array_equal(params[SCALE], np.take_along_axis(np.asarray(tried), best[None], axis=0)[0])
    assert len(np.unique(best)) > 1


@pytest.mark.parametrize(("name", "group_size"), dict.fromkeys(way[:2] for way in ways(-1, 16, 64, 128)))
def test_the_error_of_gaussian_weights_is_what_the_levels_promise(name: str, group_size: int) -> None:
    weights = np.random.default_rng(6).standard_normal((1024, 128), dtype=np.float32)
    w = mc.quantize(weights, name, group_size)
    relative = np.linalg.norm(w.dequantize("float32") - weights) / np.linalg.norm(weights)
    bound = gaussian_error(FORMATS[name].levels, 1024 if group_size == -1 else group_size)
    assert 0.4 * bound < relative < bound


@pytest.mark.parametrize("name", [name for name in FORMATS if ZERO_POINT in formats.get(name).params])
@pytest.mark.parametrize("scale_dtype", HALF)
@pytest.mark.parametrize("shift", [-100.0, -2.0, 0.0, 0.3, 100.0])
def test_zero_points_are_codes(name: str, scale_dtype: str, shift: float) -> None:
    format = formats.get(name)
    weights = gaussian(256, 33, seed=7).reshape(2, 128, 33) + np.float32(shift)
    _, params = format.quantize(weights, scalars.by_name(scale_dtype), "mse", {})
    points = params[ZERO_POINT]
    np.testing.assert_array_equal(points, np.rint(points))
    assert 0 <= points.min() <= points.max() <= format.max_code
    assert (params[SCALE] > 0).all()
    if shift == 100.0:  # all weights positive: 0 is the lowest code
        assert not points.any()
    check_rounding(format, weights, scalars.by_name(scale_dtype))


def test_nf4_has_the_levels_of_the_paper() -> None:
    """QLoRA, appendix E: 0 and both ends are levels, which increase."""
    levels = np.asarray(FORMATS["nf4"].levels)
    assert levels.size == 16
    np.testing.assert_array_equal(levels[[0, 7, 15]], [-1, 0, 1])
    np.testing.assert_allclose(levels[[1, 8]], [-0.6962, 0.0796], atol=5e-5)
    assert (np.diff(levels) > 0).all()


# ---- evenly spaced codes of 2 and 3 bits


@pytest.mark.parametrize(("name", "bits"), [("int2", 2), ("int3", 3), ("int4", 4), ("int8", 8)])
def test_symmetric_codes_count_from_the_middle(name: str, bits: int) -> None:
    middle = 2 ** (bits - 1)
    np.testing.assert_array_equal(levels_of(formats.get(name)), np.arange(-middle, middle))
    assert formats.get(name).zero_code == middle


# ---- mxfp4


def test_mxfp4_codes_are_those_of_ml_dtypes() -> None:
    format = formats.get("mxfp4")
    codes = np.arange(16, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    found = format.decode(codes[None, :, None], {SCALE: np.ones((1, 1), np.float32)})[0, :, 0]
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))  # bits: code 8 is -0


@pytest.mark.parametrize("exponent", [-126, -20, 0, 7, 120])
def test_mxfp4_weights_round_to_the_nearest_code_and_ties_to_the_even_one(exponent: int) -> None:
    """By brute force in float64, over a grid that holds all ties and what lies beside them; beyond 6 it clamps."""
    format = formats.get("mxfp4")
    grid = np.arange(-8, 8, 1 / 16)
    scale = np.full((1, 1), 2.0**exponent, np.float32)
    weights = (grid * 2.0**exponent).astype(np.float32)[None, :, None]
    codes = format.encode(weights, {SCALE: scale})[0, :, 0]
    levels = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    distance = np.abs(np.minimum(np.abs(grid), 6)[:, None] - levels)
    nearest = distance == distance.min(axis=1, keepdims=True)
    even_first = np.asarray([0, 2, 4, 6, 1, 3, 5, 7])
    expected = even_first[nearest[:, even_first].argmax(axis=1)]
    np.testing.assert_array_equal(codes & 7, expected)
    np.testing.assert_array_equal(codes >> 3, np.signbit(grid))
    of_library = grid.astype(np.float32).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    np.testing.assert_array_equal(codes, of_library)


def test_mxfp4_scales_follow_section_6_3_of_the_specification() -> None:
    """2 to the (exponent of the largest magnitude - 2, the exponent of 4, the largest power of two of e2m1)."""
    largest = np.asarray([1.0, 1.99, 2.0, 3.9, 4.0, 6.0, 7.99, 8.0, 1e-3, 1e30, 3.4e38, 2.0**-120], np.float32)
    weights = np.zeros((1, 32, largest.size), np.float32)
    weights[0, 5], weights[0, 9] = -largest, largest / 3
    _, params = formats.get("mxfp4").quantize(weights, E8M0, "absmax", {})
    expected = np.floor(np.log2(largest.astype(float))) - 2
    np.testing.assert_array_equal(E8M0.to_bits(params[SCALE])[0], expected + 127)


def test_mxfp4_scales_of_zeros_and_of_the_smallest_weights_are_representable() -> None:
    weights = np.zeros((1, 32, 3), np.float32)
    weights[0, 0, 1:] = 1e-45, 1e-38
    codes, params = formats.get("mxfp4").quantize(weights, E8M0, "absmax", {})
    np.testing.assert_array_equal(E8M0.to_bits(params[SCALE])[0], [0, 1, 1])
    assert not codes[..., 0].any()


@pytest.mark.parametrize("group_size", [-1, 16, 48, 64, 128])
def test_mxfp4_has_groups_of_32_alone(group_size: int) -> None:
    with pytest.raises(ValueError, match=rf"^group_size is {group_size}; mxfp4 has one scale per 32 weights\.$"):
        mc.quantize(gaussian(64, 64, seed=1), "mxfp4", group_size)


# ---- fp8_e4m3


def test_fp8_codes_are_those_of_ml_dtypes() -> None:
    format = formats.get("fp8_e4m3")
    one = {SCALE: np.ones((1, 1), np.float32)}
    codes = codes_of(format)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    found = format.decode(codes[None, :, None], one)[0, :, 0]
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    weights = np.random.default_rng(1).uniform(-460, 460, 10000).astype(np.float32)
    rounded = np.clip(weights, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(format.encode(weights[None, :, None], one)[0, :, 0], rounded)


def test_fp8_absmax_makes_the_largest_magnitude_the_largest_code() -> None:
    weights = gaussian(128, 33, seed=2)
    w = mc.quantize(weights, "fp8_e4m3", 128)
    largest = (w.unpack().codes & 0x7F).max(axis=0)
    np.testing.assert_array_equal(largest, np.full(33, 0x7E))


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("shape", [(256, 256), (300, 200), (128, 1), (1, 129), (129, 127), (100, 384)], ids=str)
def test_a_block_of_128_x_128_has_one_scale(shape: tuple[int, int], search: str) -> None:
    """Ragged blocks too, at the last K and the last outputs: what is there alone counts."""
    K, N = shape
    weights = gaussian(K, N, seed=3) * (1 + np.arange(N) % 7).astype(np.float32)
    w = mc.quantize(weights, "fp8_e4m3", 128, scale="block", scale_dtype="float32", search=search)
    assert w.spec.options == (("scale", "block"),)
    scales, dense = w.unpack().scales, w.dequantize("float32")
    assert scales.shape == (-(-K // 128), N)
    for row, first in itertools.product(range(scales.shape[0]), range(0, N, 128)):
        of_block = np.unique(scales[row, first : first + 128])
        assert of_block.size == 1
        block = weights[128 * row : 128 * (row + 1), first : first + 128]
        absmax = np.float32(np.abs(block).max() * np.float32(1 / 448))
        if search == "absmax":
            np.testing.assert_allclose(of_block, absmax, rtol=1e-6)
        else:
            assert 0.9 * absmax < of_block <= 1.000001 * absmax
        one = {SCALE: of_block[None]}
        alone = formats.get("fp8_e4m3")
        codes = alone.encode(block.reshape(1, -1, 1), one)
        expected = alone.decode(codes, one).reshape(block.shape)
        np.testing.assert_array_equal(dense[128 * row : 128 * (row + 1), first : first + 128], expected)


def test_the_search_picks_the_best_scale_of_each_block() -> None:
    format = formats.get("fp8_e4m3")
    weights = gaussian(128, 200, seed=4)[None]
    _, params = format.quantize(weights, F32, "mse", {"scale": "block"})
    for columns in (slice(0, 128), slice(128, 200)):
        block = weights[:, :, columns].reshape(1, -1, 1)
        _, alone = format.quantize(block, F32, "mse", {})
        np.testing.assert_array_equal(params[SCALE][0, columns], np.broadcast_to(alone[SCALE][0], 200)[columns])


def test_blocks_are_wider_than_runs_of_columns_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight is quantized a run of columns at a time; no run ends within a block."""
    weights = gaussian(200, 400, seed=5)
    whole = mc.quantize(weights, "fp8_e4m3", 128, scale="block")
    monkeypatch.setitem(packing._BLOCK_WEIGHTS, "cpu", 1)
    np.testing.assert_array_equal(mc.quantize(weights, "fp8_e4m3", 128, scale="block").packed, whole.packed)


@pytest.mark.parametrize("group_size", [-1, 64, 256])
def test_blocks_need_groups_of_128(group_size: int) -> None:
    reason = rf"^group_size is {group_size}; blocks of 128 x 128 need group_size=128\.$"
    with pytest.raises(ValueError, match=reason):
        mc.quantize(gaussian(64, 64, seed=1), "fp8_e4m3", group_size, scale="block")


def test_one_scale_per_output_is_float32_and_not_in_the_slab() -> None:
    weights = gaussian(300, 100, seed=6, dtype="float16")
    w = mc.quantize(weights, "fp8_e4m3")
    assert w.group_size == -1
    assert w.scale_dtype == "float32"
    scales = w.unpack().scales
    assert scales.dtype == np.float32
    np.testing.assert_allclose(scales[0], np.abs(weights.astype(np.float32)).max(axis=0) / 448, rtol=1e-6)
    assert w.packed.nbytes == 384 * 128


# ---- planes


@pytest.mark.parametrize(
    "planes",
    [
        (tuple(Bits(0, 0, 4) for _ in range(8)),),  # one code alone
        (tuple(Bits(value, 0, 4) for value in range(3)),),  # not all
        (tuple(Bits(value, 0, 3) for value in range(8)),),  # 24 bits
        (tuple(Bits(value, 0, 2) for value in range(16)),),  # half of each code
        (tuple(Bits(value, 1, 4) for value in range(8)),),  # beyond the code
        (tuple(Bits(value, 0, 2) for value in range(16)),) * 2,  # the same half twice
        nibble_planes(2, 1),  # of 3 bits
        (),
    ],
)
def test_planes_hold_each_bit_of_each_code_once(planes: tuple[tuple[Bits, ...], ...]) -> None:
    good = formats.get("int4")
    bad = type(good)("bad", good.codes, planes, 128, "none", 8)
    with pytest.raises(ValueError, match=r"plane.*'bad'.*\.$"):
        formats.register(bad)
    assert "bad" not in formats.names()


def test_group_sizes_of_the_layout_suite_cover_every_granule() -> None:
    granules = {128 if size == -1 else np.gcd(size, 128) for size in GROUP_SIZES}
    assert granules == {16, 32, 64, 128}
