"""Writing the directory: model.safetensors, config.json with `quantization_config`, the tokenizer's files.

`ignore` lists every nn.Linear that is not quantized, since the model is built empty here as a reader does it (../directory.py).

Layers of one kind, group and symmetry are one config group. One group alone has the target "Linear", several have their layers' names. Tensors in
full precision are stored in bf16 or fp16 where that holds every value, else in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.error import FormatError
from ...core.qtensor import QTensor
from ..checkpoint import Checkpoint
from ..directory import check_names, free, make, plain, skeleton
from .fitting import NAME, TARGETS, kind_of, why_not
from .kinds import KINDS
from .layout import Stored, store


def plan(checkpoint: Checkpoint, target: str) -> dict[str, str]:
    """The name of each tensor -> its kind, or "full" for those in full precision.

    Raises:
        FormatError: an architecture that transformers cannot build, tensors that are not its, a tensor that the target cannot hold.
    """
    why_not(TARGETS["w4a16"], target, (1, 128))                   # an unknown target
    modules = skeleton(checkpoint.config, NAME)
    check_names(modules, checkpoint)
    out = {}
    for name, tensor in checkpoint.tensors.items():
        layer = name.removesuffix(".weight")
        if isinstance(tensor, Tensor):
            if not bool(torch.isfinite(tensor).all()):
                raise FormatError(f"{name} holds NaN or infinity")
            out[name] = "full"
            continue
        if not isinstance(modules.get(layer), nn.Linear):
            raise FormatError(f"{name} belongs to a {type(modules.get(layer)).__name__}; {NAME} quantizes nn.Linear alone: keep it in full precision")
        try:
            out[name] = kind_of(tensor, checkpoint.inputs.get(layer), target)
        except FormatError as error:
            raise FormatError(f"{name}, shape {tuple(getattr(tensor, 'shape', ()))}: {error}") from None
    if bare := [layer for layer in checkpoint.inputs if out.get(f"{layer}.weight", "full") == "full"]:
        raise FormatError(f"{bare[0]} quantizes its input and not its weight, which {NAME} does not write; quantize both, or neither")
    if checkpoint.signals:
        raise FormatError(f"{checkpoint.signals[0]} is a quantized signal, and {NAME} holds weights and inputs of layers alone")
    return out


def write(checkpoint: Checkpoint, path: str | Path, target: str) -> Path:
    """The checkpoint as a directory that vLLM, SGLang and transformers with compressed-tensors load.

    Args:
        path: the directory to make; must not exist, or be empty.
        target: one of TARGETS.

    Raises:
        FormatError: what cannot be expressed (see `plan`), or something that is in the way. Then nothing is left behind.
    """
    path = free(path)
    kinds = plan(checkpoint, target)
    if set(kinds.values()) <= {"full"}:
        raise FormatError(f"no layer is quantized, so there is nothing that {NAME} could say of this model")
    tensors: dict[str, Tensor] = {}
    stored: dict[str, Stored] = {}
    for name, tensor in checkpoint.tensors.items():
        if isinstance(tensor, QTensor):
            layer = name.removesuffix(".weight")
            stored[layer] = store(tensor, KINDS[kinds[name]])
            tensors |= {f"{layer}.{part}": value for part, value in stored[layer].tensors.items()}
        else:
            tensors[name] = plain(tensor)
    config = _config(checkpoint, stored, {name.removesuffix(".weight"): kind for name, kind in kinds.items() if kind != "full"})
    return make(path, tensors, {"config.json": config}, checkpoint)


def _config(checkpoint: Checkpoint, stored: dict[str, Stored], kinds: dict[str, str]) -> dict[str, Any]:
    """config.json: the model's own, and what the groups are."""
    groups: dict[tuple[str, int | None, bool], list[str]] = {}
    for layer, kind in kinds.items():
        groups.setdefault((kind, _size(layer, kinds, stored), stored[layer].symmetric), []).append(layer)
    linear = [name for name, module in skeleton(checkpoint.config, NAME).items() if isinstance(module, nn.Linear)]
    formats = sorted({KINDS[kind].format for kind in kinds.values()})
    said = {f"group_{i}": {"targets": ["Linear"] if len(groups) == 1 else layers, "format": KINDS[kind].format,
                           "weights": KINDS[kind].args(size, symmetric), "input_activations": KINDS[kind].input_args(), "output_activations": None}
            for i, ((kind, size, symmetric), layers) in enumerate(groups.items())}
    return {**checkpoint.config, "quantization_config": {
        "quant_method": NAME, "format": formats[0] if len(formats) == 1 else "mixed-precision", "quantization_status": "compressed",
        "global_compression_ratio": None, "kv_cache_scheme": None, "ignore": [name for name in linear if name not in kinds], "config_groups": said}}


def _size(layer: str, kinds: dict[str, str], stored: dict[str, Stored]) -> int | None:
    """The group size of a layer, None for one step a channel. A layer as wide as the groups of others is of their group: it says the same."""
    mine = stored[layer]
    grouped = {other.size for name, other in stored.items() if kinds[name] == kinds[layer] and not other.whole and other.symmetric == mine.symmetric}
    return None if mine.whole and mine.size not in grouped else mine.size
