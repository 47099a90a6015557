"""Types of numbers as values and as bits: every registered one, against ml_dtypes, on NumPy and JAX arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from marlin_cupy import scalars
from marlin_cupy.scalars import BF16, E2M1, E4M3, E5M2, E8M0, F16, F32, HALVES, U2, U3, U4, U8, Float, Scalar

FLOATS = {
    F16: np.float16,
    BF16: ml_dtypes.bfloat16,
    F32: np.float32,
    E4M3: ml_dtypes.float8_e4m3fn,
    E5M2: ml_dtypes.float8_e5m2,
    E2M1: ml_dtypes.float4_e2m1fn,
}
INTEGERS = (U2, U3, U4, U8)
SMALL = [scalar for scalar in FLOATS if scalar.bits <= 8]
#: The library that computes.
LIBRARIES: dict[str, Callable[[np.ndarray], Any]] = {"numpy": np.asarray, "jax": jnp.asarray}

every_float = pytest.mark.parametrize("scalar", FLOATS, ids=lambda scalar: scalar.name)
every_small_float = pytest.mark.parametrize("scalar", SMALL, ids=lambda scalar: scalar.name)
every_library = pytest.mark.parametrize("library", LIBRARIES)


def every_bits(scalar: Scalar) -> np.ndarray:
    """All bit patterns; of 32 bits a pattern in 65537."""
    if scalar.bits == 32:
        return np.arange(0, 1 << 32, 65537, dtype=np.uint32)
    return np.arange(1 << scalar.bits, dtype=scalar.stored_as)


def finite_values(scalar: Scalar) -> tuple[np.ndarray, np.ndarray]:
    """(bits, float32 values) of all finite numbers of a floating-point type, by ml_dtypes."""
    bits = every_bits(scalar)
    values = bits.view(FLOATS[scalar]).astype(np.float32)
    return bits[np.isfinite(values)], values[np.isfinite(values)]


def assert_same_bits(found: Any, expected: np.ndarray) -> None:
    found = np.asarray(found)
    assert found.dtype == expected.dtype
    unsigned = f"uint{8 * expected.dtype.itemsize}"
    np.testing.assert_array_equal(found.view(unsigned), expected.view(unsigned))


def test_every_type_is_tested_here_and_found_by_its_name() -> None:
    named = {each for each in vars(scalars).values() if isinstance(each, Scalar)}
    assert named == {*FLOATS, *INTEGERS, E8M0}
    for scalar in named:
        assert scalars.by_name(scalar.name) is scalar
        assert np.dtype(scalar.stored_as).itemsize * 8 == max(8, scalar.bits)
    assert HALVES == (F16, BF16)


@every_library
def test_the_least_value_has_no_bits_set(library: str) -> None:
    for scalar in (*FLOATS, *INTEGERS, E8M0):
        assert_same_bits(
            scalar.from_bits(LIBRARIES[library](np.zeros(1, scalar.stored_as))), np.asarray([scalar.least], np.float32)
        )


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"^unknown type 'float64'; known types are float16, bfloat16, .*uint8\.$"):
        scalars.by_name("float64")


@every_float
def test_the_facts_are_those_of_ml_dtypes(scalar: Float) -> None:
    facts = ml_dtypes.finfo(FLOATS[scalar])
    assert scalar.max == float(facts.max)
    assert scalar.digits == facts.nmant + 1
    assert scalar.roundoff == float(facts.eps) / 2
    assert scalar.exponent_bits == facts.nexp
    assert np.dtype(scalar.name) == np.dtype(FLOATS[scalar])


# ---- floats


@every_float
@every_library
def test_every_finite_number_survives_the_round_trip(scalar: Float, library: str) -> None:
    bits, values = finite_values(scalar)
    found = scalar.from_bits(LIBRARIES[library](bits))
    assert_same_bits(found, values)
    assert_same_bits(scalar.to_bits(found), bits)


@every_small_float
@every_library
def test_ties_go_to_the_even_code(scalar: Float, library: str) -> None:
    """Between any two neighbours, subnormal or not, of both signs: the middle, and just beside it."""
    _, values = finite_values(scalar)
    values = np.sort(values[values >= 0])
    middle = (values[1:] + values[:-1]) / 2  # exact in float32
    for each in (middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))):
        for signed in (each, -each):
            expected = signed.astype(FLOATS[scalar]).view(np.uint8)
            assert_same_bits(scalar.to_bits(LIBRARIES[library](signed)), expected)


@every_float
@given(data=st.data())
def test_rounding_is_to_nearest_even(scalar: Float, data: st.DataObject) -> None:
    limit = float(np.float32(min(scalar.max, 65000.0)))
    values = data.draw(hnp.arrays(np.float32, 17, elements=st.floats(-limit, limit, width=32)))
    expected = values.astype(FLOATS[scalar])
    assert_same_bits(scalar.to_bits(values), expected.view(scalar.stored_as))
    assert_same_bits(scalar.round(values), expected.astype(np.float32))


@every_small_float
@every_library
def test_small_types_clip_to_their_range(scalar: Float, library: str) -> None:
    beyond = np.asarray([scalar.max, scalar.max * 1.01, scalar.max * 2, 1e30, 3.4e38], np.float32)
    for sign in (1, -1):
        clipped = scalar.round(LIBRARIES[library](np.float32(sign) * beyond))
        assert_same_bits(clipped, np.full(5, sign * scalar.max, np.float32))


@every_small_float
@every_library
def test_signs_of_zeros_are_kept(scalar: Float, library: str) -> None:
    tiny = np.asarray([0.0, -0.0, 1e-30, -1e-30], np.float32)  # the last two round to zeros
    assert_same_bits(scalar.round(LIBRARIES[library](tiny)), np.asarray([0.0, -0.0, 0.0, -0.0], np.float32))


def test_a_matrix_of_any_strides_becomes_bits() -> None:
    values = np.random.default_rng(1).standard_normal((6, 10)).astype(np.float32)
    for scalar, dtype in FLOATS.items():
        for strided in (values.T, values[::2, ::3], values[::-1]):
            assert_same_bits(scalar.to_bits(strided), strided.astype(dtype).view(scalar.stored_as))


# ---- powers of two


@every_library
def test_powers_of_two_are_those_of_ml_dtypes(library: str) -> None:
    bits = np.arange(255, dtype=np.uint8)  # 255 is NaN
    values = bits.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert float(values[0]) == 2.0**-127
    assert float(values[-1]) == E8M0.max
    assert_same_bits(E8M0.from_bits(LIBRARIES[library](bits)), values)
    assert_same_bits(E8M0.to_bits(LIBRARIES[library](values)), bits)
    assert not np.isfinite(np.asarray(E8M0.from_bits(LIBRARIES[library](np.full(1, 255, np.uint8)))))


@every_library
def test_other_numbers_become_the_nearest_power_of_two(library: str) -> None:
    normal = np.float32(2.0) ** np.arange(-126, 127, dtype=np.float32)
    factors = np.asarray([1.0, 1.25, np.nextafter(np.float32(1.5), np.float32(0)), 1.5, 1.75], np.float32)
    values = (normal[:, None] * factors).reshape(-1)
    expected = values.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    assert_same_bits(E8M0.to_bits(LIBRARIES[library](values)), expected)
    least = np.float32(2.0**-127)  # and float32 below it is subnormal
    ends = np.asarray([0, 1e-45, least / 2, least * 1.25, least * 1.5, least * 1.75, 1.9 * 2.0**127], np.float32)
    assert_same_bits(E8M0.to_bits(LIBRARIES[library](ends)), np.asarray([0, 0, 0, 0, 1, 1, 254], np.uint8))


def test_a_power_of_two_has_one_significant_bit() -> None:
    assert E8M0.digits == 1
    assert E8M0.roundoff == 0.5


# ---- integers


@pytest.mark.parametrize("scalar", INTEGERS, ids=lambda scalar: scalar.name)
@every_library
def test_integers_round_to_even_and_clip(scalar: Scalar, library: str) -> None:
    bits = every_bits(scalar)
    values = bits.astype(np.float32)
    assert_same_bits(scalar.from_bits(LIBRARIES[library](bits)), values)
    assert_same_bits(scalar.to_bits(LIBRARIES[library](values)), bits)
    assert float(values[-1]) == scalar.max
    between = np.asarray([-0.5, 0.5, 1.5, 2.5, -7, 300], np.float32)
    expected = np.clip(np.rint(between), 0, scalar.max).astype(np.uint8)
    assert_same_bits(scalar.to_bits(LIBRARIES[library](between)), expected)
