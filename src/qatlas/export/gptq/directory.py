"""Writing the directory: model.safetensors, config.json with `quantization_config`, the same as quantize_config.json, the tokenizer's files.

Readers take every layer of the repeated blocks for quantized. Those that are not are said twice: `modules_in_block_to_quantize` lists those that are,
for transformers; `dynamic` has "-:name" for each that is not, for GPTQModel and vLLM.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from .. import grouped
from ..checkpoint import Checkpoint, vacant
from ..folder import skeleton
from ..folder import write as appear
from .layout import CLASSES, KINDS, NAME, V1, V2, store


def plan(checkpoint: Checkpoint, target: str) -> dict[str, str]:
    """The name of each tensor -> the target, or "full" for those in full precision.

    Raises:
        FormatError: an architecture that transformers cannot build, tensors that are not its, a tensor that the target cannot hold.
    """
    return grouped.plan(checkpoint, target, KINDS)


def write(checkpoint: Checkpoint, path: str | Path, target: str) -> Path:
    """The checkpoint as a directory that vLLM, SGLang, GPTQModel and transformers with gptqmodel load.

    Args:
        path: the directory to make; must not exist, or be empty.
        target: one of TARGETS.

    Raises:
        FormatError: what cannot be expressed (see `plan`), or something that is in the way. Then nothing is left behind.
    """
    path = Path(path)
    vacant(path)
    plan(checkpoint, target)
    parts, group, tensors = grouped.stored(checkpoint, NAME, partial(store, target=target))
    said = _config(checkpoint, target, group, set(parts), all(grouped.middle(tensor, KINDS[target].bits) for tensor in parts.values()))
    config = checkpoint.config | {"quantization_config": said}
    return appear(path, tensors, config, checkpoint.tokenizer, more={"quantize_config.json": said})


def _config(checkpoint: Checkpoint, target: str, group: int, layers: set[str], middle: bool) -> dict[str, Any]:
    kind = KINDS[target]
    said: dict[str, Any] = {
        "quant_method": NAME, "bits": kind.bits, "group_size": group, "desc_act": False, "sym": middle, "lm_head": False,
        "checkpoint_format": V1 if kind.first else V2, "pack_dtype": "int32", "meta": {"quantizer": ["qatlas"]}}
    mine = [name for name, module in skeleton(checkpoint.config, NAME).items() if type(module).__name__ in CLASSES and grouped.inside(name)]
    if full := [name for name in mine if name not in layers]:
        said["modules_in_block_to_quantize"] = [[name for name in mine if name in layers]]
        said["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in full}
    return said
