"""What describes a weight: what can be asked for, its arrays, and what files say of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import FORMATS, GROUP_SIZES, gaussian, ways

import marlin_cupy as mc
from marlin_cupy import formats
from marlin_cupy.packing import check_range
from marlin_cupy.scalars import by_name
from marlin_cupy.spec import Spec

#: (format, group size, scale dtype, options): all that suites iterate.
EVERY = [(*way, {}) for way in ways(*GROUP_SIZES)] + [
    (name, group_size, scale_dtype, options)
    for name, row in FORMATS.items()
    for group_size, options in row.options
    for scale_dtype in row.scales(group_size)
]


@pytest.mark.parametrize(("name", "group_size", "scale_dtype", "options"), EVERY)
def test_a_file_says_the_same_of_a_weight(
    name: str, group_size: int, scale_dtype: str, options: dict[str, str]
) -> None:
    spec = Spec.checked(name, (300, 70), group_size, scale_dtype, options)
    assert spec.options == tuple(options.items())
    assert ("options" in spec.fields) == bool(options)  # files without options are those of the version before
    assert Spec.of_fields(spec.fields, "a file") == spec
    assert hash(spec) == hash(Spec.of_fields(spec.fields, "a file"))


def test_files_of_the_version_before_have_no_options_and_load() -> None:
    fields = {"version": 1, "format": "int4", "shape": [40, 20], "group_size": 16, "scale_dtype": "float16"}
    assert Spec.of_fields(fields, "a file") == Spec("int4", (40, 20), 16, "float16")
    assert Spec("int4", (40, 20), 16, "float16").fields == fields


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"options": {"colour": "red"}}, "option 'colour' was given; format 'fp8_e4m3' has the option scale"),
        ({"options": {"scale": "row"}}, "scale is 'row'; format 'fp8_e4m3' has group or block"),
        ({"options": {"scale": "block"}, "group_size": 64}, "blocks of 128 x 128 need group_size=128"),
        ({"options": "scale"}, ""),
        ({"options": None}, ""),
        (
            {"options": {"scale": "block"}, "format": "int8", "scale_dtype": "float16"},
            "option 'scale' was given; format 'int8' has no options",
        ),
        ({"format": "mxfp4"}, "group_size is 128; mxfp4 has one scale per 32 weights"),
        ({"format": "int4"}, "scale_dtype is 'float32'; scales of int4 are float16 or bfloat16"),
        ({"scale_dtype": "float8_e8m0fnu"}, "scales of fp8_e4m3 are"),
        ({"group_size": -1, "scale_dtype": "float16"}, "scales of fp8_e4m3 are float32"),
    ],
    ids=str,
)
def test_a_file_that_says_what_cannot_be_is_refused_in_one_sentence(changes: dict[str, Any], reason: str) -> None:
    fields = Spec("fp8_e4m3", (256, 70), 128, "float32").fields | changes
    with pytest.raises(
        mc.FileFormatError, match=r"^a file does not hold what it says: [^.]*; save it again\.$"
    ) as error:
        Spec.of_fields(fields, "a file")
    assert reason in str(error.value)


def test_the_default_of_an_option_is_no_option() -> None:
    plain = Spec.checked("fp8_e4m3", (256, 70), 128, "float32")
    assert Spec.checked("fp8_e4m3", (256, 70), 128, "float32", {"scale": "group"}) == plain


@pytest.mark.parametrize(("name", "group_size", "scale_dtype", "options"), EVERY)
def test_parts_are_the_arrays_of_a_weight(
    name: str, group_size: int, scale_dtype: str, options: dict[str, str]
) -> None:
    w = mc.quantize(gaussian(200, 70, 1), name, group_size, scale_dtype=scale_dtype, **options)
    parts = w.spec.parts
    assert list(parts) == ["packed", "output_scales"]
    packed, scales = parts.values()
    assert (packed.shape, packed.dtype, packed.derived) == (w.packed.shape, "uint8", False)
    assert (scales.shape, scales.dtype) == ((128,), "float32")
    assert scales.derived == (group_size not in FORMATS[name].output_scales)
    for part in parts.values():
        assert len(part.axes) == len(part.shape)


@pytest.mark.parametrize("name", FORMATS)
def test_defaults_are_what_the_format_has(name: str) -> None:
    for like in ("float16", "bfloat16", "float32"):
        spec = Spec.checked(name, (256, 64), None, like=like)
        scales = FORMATS[name].scales(spec.group_size)
        assert spec.group_size == formats.get(name).default_group_size
        assert spec.scale_dtype == FORMATS[name].scale(spec.group_size, like) in scales
        assert spec.dense_dtype in ("float16", "bfloat16")
        for group_size in FORMATS[name].groups(16, 128):
            usual = FORMATS[name].scale(group_size, "float16" if like == "float32" else like)
            assert Spec.checked(name, (256, 64), group_size, like=like).scale_dtype == usual


@pytest.mark.parametrize(("name", "group_size", "scale_dtype"), ways(-1, 128))
def test_weights_whose_scales_are_in_range_are_taken_and_others_refused(
    name: str, group_size: int, scale_dtype: str
) -> None:
    """Refused exactly where the scale would be infinite; the largest float32 needs none of float32 or of 8 bits."""
    spec = Spec.checked(name, (256, 64), group_size, scale_dtype)
    largest, scale = float(np.finfo(np.float32).max), by_name(scale_dtype)
    ones = np.asarray([[[1], [-1]]], np.float32)
    per_scale = 1 / float(formats.get(name).fit(ones, 1.0)[formats.SCALE].item())
    limit = min(largest, scale.max * per_scale)
    check_range(spec, 0.999 * limit)
    check_range(spec, 0.0)
    if limit * 1.001 < largest:
        with pytest.raises(ValueError, match=rf"^weights up to .* need scales up to .*, beyond {scale_dtype}; .*\.$"):
            check_range(spec, 1.001 * limit)
    if scale_dtype == "float16":
        with pytest.raises(ValueError, match=r"^weights up to .* float16 holds coarsely .*\.$"):
            check_range(spec, 2.0**-17 * per_scale)
    else:
        check_range(spec, 2.0**-17 * per_scale)
        check_range(spec, 1e-45)
