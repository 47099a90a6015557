"""What codes mean: every registered format, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from cases import FORMATS, GROUP_SIZES, HALF, gaussian, gaussian_error
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import marlin_cupy as mc
from marlin_cupy import formats
from marlin_cupy.formats import SCALE, ZERO_POINT
from marlin_cupy.formats.format import Format, Params
from marlin_cupy.formats.scalars import MAX, ROUNDOFF, from_bits, round_to, to_bits

every_format = pytest.mark.parametrize("name", FORMATS)
every_scale_dtype = pytest.mark.parametrize("scale_dtype", HALF)


def values_of_codes(format: Format, params: Params) -> np.ndarray:
    """The value of every code in every group: (codes, groups, columns)."""
    groups = params[SCALE].shape
    codes = np.arange(format.max_code + 1, dtype=np.uint8)[None, :, None]
    codes = np.broadcast_to(codes, (groups[0], codes.size, groups[1]))
    return format.decode(codes, params).transpose(1, 0, 2)


def random_params(format: Format, groups: int, columns: int, scale_dtype: str, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    params = {SCALE: round_to(rng.uniform(0.01, 3, (groups, columns)).astype(np.float32), scale_dtype)}
    if ZERO_POINT in format.params:
        params[ZERO_POINT] = rng.integers(0, format.max_code + 1, (groups, columns)).astype(np.float32)
    return params


def check_rounding(format: Format, weights: np.ndarray, scale_dtype: str) -> None:
    """Absmax quantization: codes in range, each the nearest, no weight off by more than half the widest step."""
    codes, params = format.quantize(weights, scale_dtype, "absmax")
    assert codes.dtype == np.uint8
    assert codes.shape == weights.shape
    assert int(codes.max()) <= format.max_code
    decoded = format.decode(codes, params)
    assert decoded.dtype == np.float32

    scale = params[SCALE][:, None, :]
    error = np.abs(decoded - weights)
    nearest = np.abs(values_of_codes(format, params)[:, :, None, :] - weights).min(axis=0)
    fuzz = 4 * ROUNDOFF["float32"] * (np.abs(weights) + np.abs(decoded))  # of w * (1 / scale), and of float32 here
    fuzz = fuzz + format.max_code * 2.0**-126  # below that, scales are 0
    np.testing.assert_array_less(error, nearest + fuzz + 1e-45)

    unit = values_of_codes(format, {SCALE: np.ones((1, 1), np.float32), ZERO_POINT: np.zeros((1, 1), np.float32)})
    widest_step = np.diff(unit[:, 0, 0]).max()
    # A scale rounded down leaves the largest weight outside: by the range, at most 2 * absmax, times the rounding.
    absmax = np.abs(weights).max(axis=1, keepdims=True)
    outside = 2 * absmax * ROUNDOFF[scale_dtype] + 2.0**-25 * format.max_code * (scale_dtype == "float16")
    np.testing.assert_array_less(error, scale * widest_step / 2 + outside + fuzz + 1e-45)


def test_every_registered_format_has_a_row_and_every_row_a_format() -> None:
    assert sorted(FORMATS) == formats.names()


@every_format
def test_the_format_describes_itself(name: str) -> None:
    format = formats.get(name)
    assert format.name == name
    assert format.source
    assert format.default_group_size in (-1, *range(16, 1025, 16))
    assert format.params[0] == SCALE
    assert 0 <= format.zero_code <= format.max_code == 2**format.bits - 1


@every_format
def test_a_taken_name_is_not_registered_again(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*registered already"):
        formats.register(formats.get(name))


@every_format
@every_scale_dtype
@pytest.mark.parametrize("group_size", [16, 64, 128, 384])
def test_absmax_codes_are_the_nearest_within_half_a_step(name: str, scale_dtype: str, group_size: int) -> None:
    weights = gaussian(3 * group_size, 37, seed=group_size).reshape(3, group_size, 37)
    check_rounding(formats.get(name), weights, scale_dtype)


@every_format
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
    check_rounding(formats.get(name), weights, scale_dtype)


@every_format
@every_scale_dtype
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_scales_are_rounded_before_codes_are_chosen(name: str, scale_dtype: str, search: str) -> None:
    """What is stored is what the codes were chosen for: rounding the parameters again changes nothing."""
    weights = gaussian(256, 33, seed=1).reshape(2, 128, 33)
    codes, params = formats.get(name).quantize(weights, scale_dtype, search)
    assert list(params) == list(formats.get(name).params)
    for values in params.values():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(round_to(values, scale_dtype), values)
    np.testing.assert_array_equal(formats.get(name).encode(weights, params), codes)


@every_format
@every_scale_dtype
def test_representable_weights_are_exact(name: str, scale_dtype: str) -> None:
    format = formats.get(name)
    params = random_params(format, 3, 5, scale_dtype, seed=2)
    codes = np.random.default_rng(3).integers(0, format.max_code + 1, (3, 512, 5)).astype(np.uint8)
    np.testing.assert_array_equal(format.encode(format.decode(codes, params), params), codes)


@every_format
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_groups_of_zeros_stay_zero(name: str, search: str) -> None:
    format = formats.get(name)
    weights = gaussian(128, 4, seed=4).reshape(2, 64, 4)
    weights[0, :, :2] = 0
    codes, params = format.quantize(weights, "float16", search)
    assert not params[SCALE][0, :2].any()
    assert not format.decode(codes, params)[0, :, :2].any()
    assert format.decode(codes, params)[0, :, 2:].any()


@every_format
def test_padding_stands_for_zero(name: str) -> None:
    format = formats.get(name)
    params = {key: np.zeros((1, 1), np.float32) for key in format.params}
    assert format.decode(np.full((1, 1, 1), format.zero_code, np.uint8), params).item() == 0.0


@every_format
@every_scale_dtype
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e-30, 1e-9])
def test_weights_too_small_for_a_scale_become_zero_or_stay_close(name: str, scale_dtype: str, size: float) -> None:
    """No overflow of 1 / scale on the way, no code from a NaN."""
    weights = np.asarray([[[size], [0.0], [-size]]], dtype=np.float32)
    format = formats.get(name)
    codes, params = format.quantize(weights, scale_dtype, "mse")
    decoded = format.decode(codes, params)
    assert decoded[0, 1, 0] == 0
    assert np.abs(decoded - weights).max() <= 1.001 * np.float32(size)


@every_format
@every_scale_dtype
def test_the_search_never_loses_to_absmax_and_wins_with_outliers(name: str, scale_dtype: str) -> None:
    format = formats.get(name)
    weights = gaussian(512, 65, seed=5).reshape(4, 128, 65)
    weights[:, 7, :] *= 3

    def squared_error(search: str) -> np.ndarray:
        return ((format.decode(*format.quantize(weights, scale_dtype, search)) - weights) ** 2).sum(axis=1)

    absmax, mse = squared_error("absmax"), squared_error("mse")
    assert (mse <= absmax).all()
    assert mse.sum() < absmax.sum()


@every_format
@pytest.mark.parametrize("group_size", [16, 64, 128, 1024])
def test_the_error_of_gaussian_weights_is_what_the_levels_promise(name: str, group_size: int) -> None:
    weights = np.random.default_rng(6).standard_normal((1024, 128), dtype=np.float32)
    w = mc.quantize(weights, name, group_size)
    relative = np.linalg.norm(w.dequantize("float32") - weights) / np.linalg.norm(weights)
    bound = gaussian_error(FORMATS[name].levels, group_size)
    assert 0.4 * bound < relative < bound


@pytest.mark.parametrize("name", [name for name in FORMATS if ZERO_POINT in formats.get(name).params])
@every_scale_dtype
@pytest.mark.parametrize("shift", [-100.0, -2.0, 0.0, 0.3, 100.0])
def test_zero_points_are_codes(name: str, scale_dtype: str, shift: float) -> None:
    format = formats.get(name)
    weights = gaussian(256, 33, seed=7).reshape(2, 128, 33) + np.float32(shift)
    _, params = format.quantize(weights, scale_dtype, "mse")
    points = params[ZERO_POINT]
    np.testing.assert_array_equal(points, np.rint(points))
    assert 0 <= points.min() <= points.max() <= format.max_code
    assert (params[SCALE] > 0).all()
    if shift == 100.0:  # all weights positive: 0 is the lowest code
        assert not points.any()
    check_rounding(format, weights, scale_dtype)


def test_nf4_has_the_levels_of_the_paper() -> None:
    """QLoRA, appendix E: 0 and both ends are levels, which increase."""
    levels = np.asarray(FORMATS["nf4"].levels)
    assert levels.size == 16
    np.testing.assert_array_equal(levels[[0, 7, 15]], [-1, 0, 1])
    np.testing.assert_allclose(levels[[1, 8]], [-0.6962, 0.0796], atol=5e-5)
    assert (np.diff(levels) > 0).all()


@pytest.mark.parametrize("dtype", HALF)
@given(values=hnp.arrays(np.float32, 17, elements=st.floats(-65000, 65000, width=32)))
def test_rounding_to_16_bits_is_to_nearest_even(dtype: str, values: np.ndarray) -> None:
    import ml_dtypes

    expected = values.astype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
    np.testing.assert_array_equal(to_bits(values, dtype), expected.view(np.uint16))
    np.testing.assert_array_equal(from_bits(to_bits(values, dtype), dtype), expected.astype(np.float32))


@pytest.mark.parametrize("dtype", HALF)
def test_every_finite_16_bit_value_survives_the_round_trip(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = from_bits(bits, dtype)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(to_bits(values[finite], dtype), bits[finite])
    assert float(values[finite].max()) == MAX[dtype]


def test_group_sizes_of_the_layout_suite_cover_every_granule() -> None:
    granules = {128 if size == -1 else np.gcd(size, 128) for size in GROUP_SIZES}
    assert granules == {16, 32, 64, 128}
