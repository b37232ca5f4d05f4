"""What others read in the directory: gptqmodel, layer by layer, and transformers with it.

gptqmodel's layer decodes in the type of its steps; handed over in fp32 they give the exact weights. transformers loads the directory through optimum
and gptqmodel, whose layers compute in fp16: so each is taken out after loading and its own decode, in fp32, put into an nn.Linear. What is compared
is what transformers found in the directory, not the rounding of fp16. Biases, which it loads as fp16, are taken from the file.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.error import FormatError
from ..directory import headers, tensors
from .checkpoint import _first, _shape, config
from .layout import NAME, Parts

NEEDS = ("gptqmodel", "optimum")


def lacks() -> str | None:
    """The sentence for missing readers, or None."""
    gone = [name for name in NEEDS if not find_spec(name)]
    return f"the package {gone[0]} is not installed, which reads {NAME} directories: pip install gptqmodel optimum" if gone else None


def read(path: str | Path) -> dict[str, Tensor]:
    """The weights of a directory under their Hugging Face names, fp32, through gptqmodel's own decode.

    Raises:
        FormatError: no such directory, a truncated or foreign one, or the package is missing.
    """
    if lacks():
        raise FormatError(str(lacks()))
    said, found = config(path), headers(path)
    first = _first(said, path)
    layers = {name.removesuffix(".qweight"): {} for name in found if name.endswith(".qweight")}
    out: dict[str, Tensor] = {}
    for name, tensor in tensors(found):
        layer, _, part = name.rpartition(".")
        if layer in layers and part in Parts._fields:
            layers[layer][part] = tensor
        else:
            out[name] = tensor.float() if tensor.is_floating_point() else tensor
    for layer, parts in layers.items():
        out[f"{layer}.weight"] = _decoded(parts, _shape(layer, found, said), first)
    return out


def _decoded(parts: dict[str, Tensor], shape: tuple[int, int, int], first: int) -> Tensor:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    bits, inputs, groups = shape
    layer = TorchLinear(bits=bits, group_size=inputs // groups, sym=False, desc_act=False, in_features=inputs, out_features=parts["scales"].shape[1],
                        bias=False, pack_dtype=torch.int32, register_buffers=True)
    for name, part in parts.items():
        setattr(layer, name, part.float() if name == "scales" else part)
    if first:
        convert_gptq_v1_to_v2_format_module(layer, bits=bits, pack_dtype=torch.int32)
    return layer.eval().dequantize_weight().T.contiguous()


def model(path: str | Path) -> nn.Module | str:
    """The model that transformers loads from the directory, computing in fp32, or a sentence on why it cannot.

    Raises:
        FormatError: a directory that transformers refuses.
    """
    if lacks():
        return str(lacks())
    import transformers
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    config(path)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            names = transformers.AutoConfig.from_pretrained(path, local_files_only=True).architectures
            made: Any = getattr(transformers, names[0]).from_pretrained(
                Path(path), dtype=torch.float32, local_files_only=True, use_safetensors=True, device_map="cpu",
                quantization_config=transformers.GPTQConfig(bits=4, backend="gptq_torch"))
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError, AssertionError, ImportError) as error:
            raise FormatError(f"transformers cannot load {path}: {error}") from error
    plain = {name: t for name, t in tensors({n: s for n, s in headers(path).items() if n.endswith(".bias")})}
    for name, layer in [(n, m) for n, m in made.named_modules() if isinstance(m, BaseQuantLinear)]:
        made.set_submodule(name, _linear(layer, plain.get(f"{name}.bias")))
    return made.eval()


def _linear(layer: Any, bias: Tensor | None) -> nn.Linear:
    layer.scales = layer.scales.float()
    weight = type(layer).dequantize_weight(layer).T.contiguous()
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.float(), requires_grad=False)
    return made
