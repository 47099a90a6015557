"""PyTorch modules: Linear over a packed weight, whole models quantized in place, their files.

model = quantize_model_(model, device="cuda")      # every nn.Linear, one at a time
save_quantized(model, "model.safetensors")
load_quantized_(other, "model.safetensors")        # a model of the same architecture, not quantized yet
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch

from marlin_cupy.compilers.torch import given, multiply
from marlin_cupy.errors import FileFormatError
from marlin_cupy.files import METADATA_KEY, check_parts, described, kept, whole_file
from marlin_cupy.frameworks.torch import FRAMEWORK
from marlin_cupy.integrations import replacing
from marlin_cupy.integrations.replacing import Filter, Place, Report, free_cupy_memory, replace
from marlin_cupy.placed import Placed
from marlin_cupy.quantizing import quantize
from marlin_cupy.scalars import HALF_NAMES
from marlin_cupy.spec import Spec
from marlin_cupy.tensor import QuantizedTensor

#: Whether there is autocast on any device.
_any_autocast: Any = torch._C._is_any_autocast_enabled
_STATE = "_extra_state"  # PyTorch's name for what get_extra_state returns
L = TypeVar("L", bound="Linear")


class Linear(torch.nn.Module):
    """y = x @ W + bias with a packed W, in place of torch.nn.Linear.

    Inference and training of what is around it: gradients flow to x and bias, from the same packed weight, and none to
    W. It can be compiled, exported and captured into CUDA graphs. Under autocast, x and bias are cast.

    Changes of dtype (``half()``, ``to(torch.bfloat16)``) change the bias and never the packed weight. Whatever moves or
    loads a module is safe with dependent launches, see :func:`marlin_cupy.matmul`; whoever else writes into ``packed``
    calls :meth:`mark_written`.

    Args:
        in_features, out_features: K and N.
        bias: whether there is one.
        format, group_size, scale_dtype: as in :func:`marlin_cupy.quantize` of a weight of ``dtype``.
        device, dtype: where it is, and the dtype of bias; PyTorch's current device, and float16, if None.

    Attributes:
        packed: uint8 buffer (ceil(N / 64), ceil(K / 128), slab_bytes), zeros until something is loaded.
        output_scales: float32 buffer. Of a format that has such scales it is saved; else it is made from ``packed`` on
            a GPU, and None elsewhere. Each of Spec.parts has a buffer.
        bias: parameter [N] or None.
        spec: what ``packed`` holds.
        batch_invariant: as in :func:`marlin_cupy.matmul`; False.
    """

    packed: torch.Tensor
    output_scales: torch.Tensor | None
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str = "int4",
        group_size: int | None = None,
        scale_dtype: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dtype = dtype or torch.float16
        shape = in_features, out_features
        like = str(dtype).removeprefix("torch.")
        if scale_dtype is None and like not in HALF_NAMES:
            raise ValueError(
                f"dtype is {like} and scale_dtype was not given; use {' or '.join(HALF_NAMES)} for either."
            )
        spec = Spec.checked(format, shape, group_size, scale_dtype, like=like)
        self._set_zeros(spec, dtype if bias else None, device)

    def _set_zeros(self, spec: Spec, bias: torch.dtype | None, device: torch.device | str | None) -> None:
        """What something can be loaded into; ``bias`` is its dtype."""
        parts: dict[str, torch.Tensor] = {
            name: torch.zeros(spec.parts[name].shape, dtype=getattr(torch, spec.parts[name].dtype), device=device)
            for name in kept(spec)
        }
        zeros = None if bias is None else torch.nn.Parameter(torch.zeros(spec.shape[1], dtype=bias, device=device))
        self._set(spec, parts, zeros)
        self.mark_written()

    def _set(
        self,
        spec: Spec,
        parts: Mapping[str, torch.Tensor | None],
        bias: torch.nn.Parameter | None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.in_features, self.out_features = spec.shape
        self.batch_invariant = False
        for name, part in spec.parts.items():
            self.register_buffer(name, parts.get(name), persistent=not part.derived)
        self.register_parameter("bias", bias)

    @classmethod
    def from_quantized(cls: type[L], w: QuantizedTensor, bias: torch.Tensor | None = None) -> L:
        """Over the memory of ``w``, which is that of any library, and of ``bias``, float16 or bfloat16[N].

        Raises:
            TypeError, ValueError: not that.
        """
        if not isinstance(w, QuantizedTensor):
            raise TypeError(f"w is a {type(w).__name__}; pass a QuantizedTensor, from quantize, pack or load.")
        w = w if isinstance(w.packed, torch.Tensor) else w.to("torch")
        if bias is not None and (tuple(bias.shape) != w.shape[1:] or bias.device != w.packed.device):
            raise ValueError(
                f"bias has shape {tuple(bias.shape)} on {bias.device}; "
                f"this weight needs {w.shape[1:]} on {w.packed.device}."
            )
        if bias is not None and not isinstance(bias, torch.nn.Parameter):
            bias = torch.nn.Parameter(bias.detach())
        layer = cls.__new__(cls)
        layer._set(w.spec, w.parts, bias)
        return layer

    @classmethod
    def from_linear(
        cls: type[L],
        linear: torch.nn.Linear,
        format: str = "int4",
        group_size: int | None = None,
        *,
        scale_dtype: str | None = None,
        search: str = "absmax",
        device: torch.device | str | None = None,
    ) -> L:
        """``linear``, quantized by rounding to nearest; see :func:`marlin_cupy.quantize` for arguments and errors.

        The bias keeps its dtype; where ``device`` is None it is shared.
        """
        return cls.in_place_of(
            linear, _quantized(linear, format, group_size, scale_dtype=scale_dtype, search=search, device=device)
        )

    @classmethod
    def in_place_of(cls: type[L], linear: torch.nn.Linear, w: QuantizedTensor) -> L:
        """Over the memory of ``w``, with the bias of ``linear``, moved to where ``w`` is; training as ``linear`` is.

        Raises:
            TypeError, ValueError: as :meth:`from_quantized`.
        """
        bias = linear.bias
        if bias is not None and bias.device != w.packed.device:
            bias = torch.nn.Parameter(bias.detach().to(w.packed.device), requires_grad=bias.requires_grad)
        return cls.from_quantized(w, bias).train(linear.training)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight, over the same memory."""
        return QuantizedTensor(self.spec, **self._parts)

    @property
    def _parts(self) -> dict[str, torch.Tensor | None]:
        return {name: getattr(self, name) for name in self.spec.parts}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float16 or bfloat16[..., K], as bias, on the device of the weight; returns [..., N]."""
        return self.product(x, self.bias)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As forward, with another bias or none."""
        if torch.compiler.is_compiling() or _any_autocast():
            kind = x.device.type
            if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):  # others, meta say, may know no autocast
                dtype = torch.get_autocast_dtype(kind)
                x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        packed = self._buffers["packed"]
        if FRAMEWORK.follows(x, packed, bias):
            return multiply(x, given(self._parts), bias, self.spec, self.batch_invariant)
        y: torch.Tensor = self._placed(packed).multiply(FRAMEWORK, x, bias, None, self.batch_invariant)
        return y

    def _placed(self, packed: Any) -> Placed:
        """The weight where it is; found again while its memory is the same."""
        known = self.__dict__.get("_place")
        if known is None or known[0] is not packed or known[1] != packed.data_ptr():
            known = self.__dict__["_place"] = packed, packed.data_ptr(), self.quantized.placed
        place: Placed = known[2]
        return place

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.spec.format}, group_size={self.spec.group_size}, scale_dtype={self.spec.scale_dtype}"
        )

    def mark_written(self) -> None:
        """Say that something other than this class has written into ``packed``, on PyTorch's current stream.

        See :meth:`marlin_cupy.QuantizedTensor.mark_written`.
        """
        self.__dict__.pop("_place", None)
        derived = [name for name, part in self.spec.parts.items() if part.derived]
        if self.packed.is_meta:
            for name in derived:
                setattr(self, name, None)
            return
        w = QuantizedTensor(self.spec, **{name: part for name, part in self._parts.items() if name not in derived})
        for name in derived:
            old, new = getattr(self, name), _owned(w.parts[name])
            if old is None or new is None or old.device != new.device:
                setattr(self, name, new)
            else:
                old.copy_(new)  # in the same memory, since launches in graphs read it
        w.placed.writes.mark()

    # ---- what PyTorch does to modules

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = self._parts
        for name, part in self.spec.parts.items():
            if part.derived:
                setattr(self, name, None)  # not to be cast to another dtype
        base: Any = super()
        base._apply(fn, recurse)
        for name, array in before.items():
            now = getattr(self, name)
            if now is None:
                setattr(self, name, array)
            elif array is not None and now.dtype != array.dtype:  # half() and Module.type() cast what they meet
                setattr(self, name, array.to(now.device))
        if self.packed is not before["packed"]:
            self.mark_written()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("_place", None)  # addresses do not travel
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        base: Any = super()
        base.__setstate__(state)
        self.mark_written()  # a copy, or what was read from a file

    def get_extra_state(self) -> torch.Tensor:
        """What ``packed`` holds, as the bytes of a JSON text: any file format for tensors can keep it."""
        return torch.tensor(
            list(json.dumps(self.spec.fields, sort_keys=True).encode()), dtype=torch.uint8, device="cpu"
        )

    def set_extra_state(self, state: Any) -> None:
        """Nothing: it was compared before anything was loaded."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        refusal = self._refuses(state_dict, prefix)
        if refusal is not None:
            errors.append(refusal)
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self.mark_written()

    def _refuses(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Why these tensors are not for this layer."""
        layer = f"{prefix.removesuffix('.') or 'this layer'} is {_words(self.spec)}"
        if prefix + "packed" not in state_dict:
            if prefix + "weight" not in state_dict:
                return None  # PyTorch says what is missing
            return f"{layer}, and the checkpoint has a dense weight; load it into torch.nn.Linear and quantize that."
        if prefix + _STATE not in state_dict:
            return f"{layer}, and the checkpoint does not say what its packed weight is; {prefix}{_STATE} is missing."
        try:
            text = bytes(state_dict[prefix + _STATE].tolist())
            found = Spec.of_fields(json.loads(text), f"{prefix}{_STATE}")
        except (ValueError, TypeError, AttributeError) as error:
            return f"{layer}, and the checkpoint's description cannot be read ({error}); save it again."
        if found != self.spec:
            return f"{layer}, and the checkpoint has {_words(found)}; make the layer alike."
        return None


def _owned(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """On a GPU a copy in PyTorch's memory, made when this returns: CuPy, whose ``tensor`` is, may use that again."""
    if tensor is None or not tensor.is_cuda:
        return tensor
    copy = tensor.clone()
    torch.cuda.synchronize(copy.device)
    return copy


def _words(spec: Spec) -> str:
    K, N = spec.shape
    return f"{spec.format} ({K}, {N}) with group_size {spec.group_size} and {spec.scale_dtype} scales"


def _name_of(device: torch.device) -> str:
    """As quantize takes it; "cuda" is PyTorch's current GPU."""
    if device.type != "cuda":
        return str(device)
    return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"


def _quantized(
    linear: torch.nn.Linear,
    format: str,
    group_size: int | None,
    *,
    scale_dtype: str | None,
    search: str,
    device: torch.device | str | None,
) -> QuantizedTensor:
    """The weight of ``linear``, in PyTorch's own memory."""
    w = quantize(
        linear.weight.detach().T,
        format,
        group_size,
        scale_dtype=scale_dtype,
        search=search,
        device=None if device is None else _name_of(torch.device(device)),
    ).to("torch")
    return QuantizedTensor(w.spec, **{name: _owned(part) for name, part in w.parts.items()})


# ---- models


def quantize_model_(
    model: torch.nn.Module,
    format: str = "int4",
    group_size: int | None = None,
    *,
    filter: Filter | None = None,
    scale_dtype: str | None = None,
    search: str = "absmax",
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Report:
    """Replace the torch.nn.Linear layers of ``model`` by :class:`Linear`, in place, one after the other.

    No more than one layer is held both ways. Layers that share a weight share the packed one; a layer that shares its
    weight with something else, an embedding for instance, is kept, as are subclasses of torch.nn.Linear.

    Args:
        model: any module that has such layers in it.
        format, group_size, scale_dtype, search: as in :func:`marlin_cupy.quantize`.
        filter: which layers: a function of name and layer, or a pattern of names or several ("*.mlp.*"); all if None.
        device: where quantized layers go, and where quantizing is done; where each layer is if None. With "cuda" a
            model in host memory goes there layer by layer; move the rest afterwards, with ``model.to("cuda")``.
        progress: show a progress bar on standard error.

    Raises:
        TypeError: ``model`` is no module. ValueError: as :func:`marlin_cupy.quantize`, with the name of the layer; the
            layers ahead of it have been replaced. Or ``model`` is itself a torch.nn.Linear, which has no place to be
            replaced in.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass a torch.nn.Module.")
    if isinstance(model, torch.nn.Linear):
        raise ValueError("model is itself a torch.nn.Linear; use Linear.from_linear.")

    def packed(name: str, layer: torch.nn.Linear) -> QuantizedTensor:
        w = _quantized(layer, format, group_size, scale_dtype=scale_dtype, search=search, device=device)
        free_cupy_memory(w.device)
        return w

    return replace(_Model(model), packed, filter=filter, progress=progress)


class _Model(replacing.Model):
    """A PyTorch module."""

    linear = torch.nn.Linear

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._owners: dict[int, set[type]] = {}  # of a parameter, by its id
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(id(parameter), set()).add(type(module))

    def places(self) -> Iterator[Place]:
        """By every name that a layer has."""
        for name, module in _named(self._model).items():
            if isinstance(module, torch.nn.Linear):
                yield Place(name, module, id(module.weight), functools.partial(_put, self._model, name))

    def weight(self, layer: torch.nn.Linear) -> torch.Tensor:
        """(N, K)."""
        return layer.weight

    def layer(self, old: torch.nn.Linear, w: QuantizedTensor) -> Linear:
        """With the bias where ``w`` is."""
        return Linear.in_place_of(old, w)

    def tied(self, layer: torch.nn.Linear) -> str | None:
        """To an embedding, for instance."""
        others = sorted(owner.__name__ for owner in self._owners[id(layer.weight)] - {torch.nn.Linear})
        return f"its weight is shared with {', '.join(others)}" if others else None


# ---- files


def save_quantized(model: torch.nn.Module, path: str | os.PathLike[str]) -> None:
    """Write all tensors of a model to one safetensors file, with what its packed weights are, and checksums of them.

    Tensors that share memory are written once. The file appears whole or not at all.

    Raises:
        ValueError: the model has no :class:`Linear` layer. TypeError: its state holds something that is no tensor.
    """
    path = Path(path)
    layers = {name: module for name, module in _named(model).items() if isinstance(module, Linear)}
    if not layers:
        raise ValueError("the model has no quantized layer; quantize_model_ makes them.")
    tensors: dict[str, torch.Tensor] = {}
    same: dict[str, str] = {}
    first: dict[Any, str] = {}  # by the memory that a tensor has
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} in the model's state is a {type(value).__name__}; only tensors can be saved.")
        key = value.device, value.data_ptr(), value.shape, value.stride(), value.dtype
        if value.numel() and key in first:
            same[name] = first[key]
        else:
            first[key] = name
            tensors[name] = value.contiguous()
    description = {
        "layers": {
            name: described(layer.spec, {part: getattr(layer, part).cpu().numpy() for part in kept(layer.spec)})
            for name, layer in layers.items()
        },
        "same": same,
    }
    with whole_file(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(description)})


def load_quantized_(
    model: torch.nn.Module, path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> None:
    """Read a file of :func:`save_quantized` into a model of the same architecture, checking every packed byte.

    Its torch.nn.Linear layers that the file has quantized are replaced, so that it may come without weights, from
    ``with torch.device("meta")``.

    Args:
        model: the model, changed in place.
        path: the file.
        device: where the tensors of a model on the meta device go. Those of other models stay where they are.

    Raises:
        FileNotFoundError: no such file. FileFormatError: not such a file, truncated or edited. ValueError: the model
            has no layer of that name and shape. RuntimeError, by PyTorch: other tensors than the model has.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = json.loads(text or "null")
        layers, same = dict(found["layers"]), dict(found["same"])
        state |= {name: state[other] for name, other in same.items()}
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise FileFormatError(f"{path} is no file of save_quantized ({error!r}); save it again.") from error
    for name, fields in layers.items():
        spec = Spec.of_fields(fields, f"{path}: {name}")
        missing = [part for part in kept(spec) if f"{name}.{part}" not in state]
        if missing:
            raise FileFormatError(f"{path} has no {name}.{missing[0]}, which it says it has; save it again.")
        check_parts(fields, spec, {part: state[f"{name}.{part}"].numpy() for part in kept(spec)}, f"{path}: {name}")
    modules, specs = _named(model), {name: Spec.of_fields(fields, path) for name, fields in layers.items()}
    for name, spec in specs.items():
        module = modules.get(name)
        if not isinstance(module, torch.nn.Linear | Linear) or (module.in_features, module.out_features) != spec.shape:
            raise ValueError(f"{path} has a Linear layer {name} of (K, N) = {spec.shape}, and the model {module!r}.")
    new: dict[torch.nn.Module, Linear] = {}  # by what it takes the place of
    for name, spec in specs.items():
        old = modules[name]
        if isinstance(old, torch.nn.Linear):
            if old not in new:
                new[old] = _empty(spec, state.get(f"{name}.bias"), old.weight.device).train(old.training)
            _put(model, name, new[old])
    on_meta = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    if on_meta:
        state = {name: tensor.to(device) for name, tensor in state.items()}
    model.load_state_dict(state, assign=on_meta)


def _empty(spec: Spec, bias: torch.Tensor | None, device: torch.device) -> Linear:
    """A layer to load into."""
    layer = Linear.__new__(Linear)
    layer._set_zeros(spec, None if bias is None else bias.dtype, device)
    return layer


def _named(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every module by every name that it has."""
    return dict(model.named_modules(remove_duplicate=False))


def _put(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
