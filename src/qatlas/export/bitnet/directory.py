"""Writing the directory (export/folder.py) and `quantization_config`: the class of the layers, and which layers are left alone.

transformers replaces every nn.Linear but those of `modules_to_not_convert`, whose entries it takes as prefixes, suffixes and regular expressions.
They are the names of the layers in full precision; where such a name would touch a quantized layer as well ("fc" and "inner.fc"), all are written as
whole regular expressions.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...core.error import FormatError
from ...core.qtensor import QTensor
from .. import folder
from ..checkpoint import Checkpoint, vacant
from .fitting import NAME, TARGETS, kind_of, step, unit, why_not
from .layout import stripes


def plan(checkpoint: Checkpoint, target: str) -> dict[str, str]:
    """The name of each tensor -> the target, or "full" for those in full precision.

    Raises:
        FormatError: an architecture that transformers cannot build, tensors that are not its, a tensor that the target cannot hold.
    """
    why_not(TARGETS["bitlinear"], target, (4, 4))                 # an unknown target
    return folder.plan(checkpoint, NAME, partial(kind_of, target=target))


def write(checkpoint: Checkpoint, path: str | Path, target: str) -> Path:
    """The checkpoint as a directory that transformers loads with BitLinear or AutoBitLinear layers.

    Args:
        path: the directory to make; must not exist, or be empty.
        target: bitlinear or autobitlinear.

    Raises:
        FormatError: what cannot be expressed (see `plan`), or something that is in the way. Then nothing is left behind.
    """
    path = Path(path)
    vacant(path)
    found = plan(checkpoint, target)
    if set(found.values()) <= {"full"}:
        raise FormatError(f"no layer is quantized, so there is nothing that {NAME} could say of this model")
    tensors: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        if isinstance(tensor, QTensor):
            s = step(tensor)
            tensors[name] = stripes((tensor.values() / unit(tensor.grid)).cpu())  # type: ignore[operator]
            tensors[f"{name}_scale"] = 1 / s if target == "bitlinear" else s
        else:
            tensors[name] = folder.plain(tensor)
    quantized = {name.removesuffix(".weight") for name, kind in found.items() if kind != "full"}
    linear = [name for name, module in folder.skeleton(checkpoint.config, NAME).items() if isinstance(module, nn.Linear)]
    said: dict[str, Any] = {"quant_method": NAME, "linear_class": target, "quantization_mode": "offline", "use_rms_norm": False,
                            "modules_to_not_convert": _left(linear, quantized)}
    return folder.write(path, tensors, {**checkpoint.config, "quantization_config": said}, checkpoint.tokenizer)


def _left(linear: list[str], quantized: set[str]) -> list[str]:
    """What leaves alone the layers in full precision, and no other."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = [name for name in linear if name not in quantized]
    clear = all(should_convert_module(name, names) for name in quantized)
    return names if clear else [f"^{re.escape(name)}$" for name in names]
