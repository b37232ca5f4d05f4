"""What others read in the directory: gptqmodel, layer by layer, and transformers with it (../loaded.py).

gptqmodel's layer decodes in the type of its steps; handed over in fp32 they give the exact weights.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.error import FormatError
from .. import loaded
from ..folder import skeleton
from ..shards import headers, read_json, tensors
from .checkpoint import config, first_zero, shape_of
from .layout import NAME, Parts

NEEDS = ("gptqmodel", "optimum")


def lacks() -> str | None:
    """The sentence for missing readers, or None."""
    gone = [name for name in NEEDS if not find_spec(name)]
    return (f"the package {gone[0]} is not installed, which reads {NAME} directories: pip install gptqmodel optimum, in an environment of its own, "
            "since gptqmodel 7.7 asks for torch 2.14" if gone else None)


def read(path: str | Path) -> dict[str, Tensor]:
    """The weights of a directory under their Hugging Face names, fp32, through gptqmodel's own decode.

    Raises:
        FormatError: no such directory, a truncated or foreign one, or the package is missing.
    """
    if lacks():
        raise FormatError(str(lacks()))
    said, found = config(path), headers(path)
    first = first_zero(said, path)
    layers: dict[str, dict[str, Tensor]] = {name.removesuffix(".qweight"): {} for name in found if name.endswith(".qweight")}
    out: dict[str, Tensor] = {}
    for name, tensor in tensors(found):
        layer, _, part = name.rpartition(".")
        if layer in layers and part in Parts._fields:
            layers[layer][part] = tensor
        else:
            out[name] = tensor.float() if tensor.is_floating_point() else tensor
    with loaded.silent():
        for layer, parts in layers.items():
            out[f"{layer}.weight"] = _decoded(parts, shape_of(layer, found, said), first)
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
    found: Tensor = layer.eval().dequantize_weight().T.contiguous()
    return found


def model(path: str | Path) -> nn.Module | str:
    """The model that transformers loads from the directory, computing in fp32, or a sentence on why it cannot.

    Raises:
        FormatError: a directory that transformers refuses.
    """
    if lacks():
        return str(lacks())
    import transformers

    config(path)
    if any(type(module).__name__ == "Conv1D" for module in skeleton(read_json(Path(path) / "config.json"), NAME).values()):
        return "transformers initialises the weights of Conv1D layers itself while it loads, and gptqmodel's layers have none to initialise"
    return loaded.load(path, transformers.GPTQConfig(bits=4, backend="gptq_torch"), _decode)      # of this setting only the backend is heard


def _decode(layer: Any) -> Tensor:
    layer.scales = layer.scales.float()
    found: Tensor = type(layer).dequantize_weight(layer)          # the class's own: the instance has a compiled one
    return found
