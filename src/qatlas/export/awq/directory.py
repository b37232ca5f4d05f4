"""Writing the directory, and reading one, of ours or of others, as QTensors.

config.json gets `quantization_config`; its `modules_to_not_convert` lists every nn.Linear that is not quantized, since readers take all others for
quantized.

Reading. Inputs, outputs and groups of a layer follow from the shapes of its tensors, which must agree with one another and with config.json. A file
that says zero_point=false may leave qzeros out: its zeros are 8. Refused, with the reason: the layouts of other kernels (gemv, gemv_fast, exllama,
marlin, llm-awq), other bits than 4, and models in which AutoAWQ put scales of their own behind an activation (BLOOM, MPT, Falcon, ...), which belong
to no weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.error import FormatError
from ...core.qtensor import QTensor
from .. import grouped
from ..checkpoint import Checkpoint, vacant
from ..folder import skeleton
from ..folder import write as appear
from ..shards import Stored, headers, quantization, tensors
from .layout import BITS, KINDS, NAME, Parts, restore, store

OLD = "quant_config.json"                                         # where AutoAWQ wrote it before config.json had a place
STEPS = {"F16", "BF16", "F32"}


def plan(checkpoint: Checkpoint, target: str) -> dict[str, str]:
    """The name of each tensor -> the target, or "full" for those in full precision.

    Raises:
        FormatError: an architecture that transformers cannot build, tensors that are not its, a tensor that the target cannot hold.
    """
    return grouped.plan(checkpoint, target, KINDS)


def write(checkpoint: Checkpoint, path: str | Path, target: str) -> Path:
    """The checkpoint as a directory that vLLM, SGLang and transformers with gptqmodel load.

    Args:
        path: the directory to make; must not exist, or be empty.
        target: one of TARGETS.

    Raises:
        FormatError: what cannot be expressed (see `plan`), or something that is in the way. Then nothing is left behind.
    """
    path = Path(path)
    vacant(path)
    plan(checkpoint, target)
    parts, group, out = grouped.stored(checkpoint, NAME, partial(store, target=target))
    full = [name for name, module in skeleton(checkpoint.config, NAME).items() if isinstance(module, nn.Linear) and name not in parts]
    said = {"quant_method": NAME, "bits": BITS, "group_size": group, "zero_point": True, "version": "gemm", "modules_to_not_convert": full or None}
    return appear(path, out, checkpoint.config | {"quantization_config": said}, checkpoint.tokenizer)


def holds(path: str | Path) -> bool:
    """Whether a directory is of this format, by its config alone."""
    try:
        return bool(config(path))
    except FormatError:
        return False


def config(path: str | Path) -> dict[str, Any]:
    """What a directory says of its quantization, in today's names.

    Raises:
        FormatError: no such directory, or another method.
    """
    found = quantization(path, NAME, OLD)
    old = {"bits": found.get("w_bit"), "group_size": found.get("q_group_size", -1)} if "w_bit" in found else {}
    return found | old


def qtensors(path: str | Path) -> dict[str, QTensor | Tensor]:
    """Every tensor of a directory under its Hugging Face name: weights of quantized layers as QTensors (out, in), all else as it is.

    Raises:
        FormatError: no such directory, another method, a layout or a file that we cannot read exactly (see above).
    """
    layers, found = parts(path)
    out: dict[str, QTensor | Tensor] = {}
    mine: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors(found):
        layer, _, part = name.rpartition(".")
        if layer not in layers or part == "bias":
            out[name] = tensor
            continue
        have = mine.setdefault(layer, {})
        have[part] = tensor
        if set(have) >= {other for other in Parts._fields if f"{layer}.{other}" in found}:
            out[f"{layer}.weight"] = restore(whole(layer, mine.pop(layer)))
    return out


def parts(path: str | Path) -> tuple[set[str], dict[str, Stored]]:
    """The quantized layers of a directory, and the headers of all its tensors, both held against config.json and one another.

    Raises:
        FormatError: as `qtensors`.
    """
    said, found = config(path), headers(path)
    version = str(said.get("version") or said.get("format") or "gemm").lower()
    if version != "gemm":
        raise FormatError(f"{path} lies in AWQ's layout {version!r}, which is made for one kernel; 'gemm' can be read")
    size = said.get("group_size", -1)
    if said.get("bits") != BITS or type(size) is not int or not (size == -1 or size > 0):
        raise FormatError(f"{path} says bits={said.get('bits')!r}, group_size={size!r}; AWQ has 4 bits, and a group of inputs, or -1 for all")
    layers = {name.removesuffix(".qweight") for name in found if name.endswith(".qweight")}
    for name in found:
        if name.endswith(".scales") and name.removesuffix(".scales") not in layers:
            raise FormatError(f"{name} belongs to no quantized weight; AutoAWQ scales an activation there, which no weight can say")
    for layer in sorted(layers):
        _check(layer, found, said, size)
    return layers, found


def whole(layer: str, have: Mapping[str, Tensor]) -> Parts:
    """A layer's tensors, with zeros in the middle where a file leaves them out.

    Raises:
        FormatError: steps that are no numbers.
    """
    scales = have["scales"]
    if not bool(torch.isfinite(scales).all()):
        raise FormatError(f"{layer}: scales hold NaN or infinity")
    middle = torch.full((scales.shape[0], scales.shape[1] // 8), -0x77777778, dtype=torch.int32)         # 0x88888888
    return Parts(have["qweight"], have.get("qzeros", middle), scales)


def _check(layer: str, found: Mapping[str, Stored], said: Mapping[str, Any], size: int) -> None:
    if strange := [name for name in found if name.startswith(f"{layer}.") and name.removeprefix(f"{layer}.") not in (*Parts._fields, "bias")]:
        raise FormatError(f"{strange[0]} is a part that AWQ does not know, and may mean that {layer} computes something else")
    needed = ("scales",) if said.get("zero_point") is False else ("qzeros", "scales")
    if gone := [part for part in needed if f"{layer}.{part}" not in found]:
        raise FormatError(f"{layer} has a qweight and no {gone[0]}; the copy is not complete")
    word, scale = found[f"{layer}.qweight"], found[f"{layer}.scales"]
    zero = found.get(f"{layer}.qzeros")
    if word.dtype != "I32" or scale.dtype not in STEPS or len(word.shape) != 2 or len(scale.shape) != 2 or (zero is not None and zero.dtype != "I32"):
        raise FormatError(f"{layer}: qweight is {word.dtype} {word.shape}, scales {scale.dtype} {scale.shape}, qzeros "
                          f"{zero.dtype if zero else 'missing'}; these are no I32, F16 and I32 matrices")
    (inputs, columns), (groups, outputs) = word.shape, scale.shape
    if not inputs or not groups or inputs % groups or columns * 8 != outputs or (zero is not None and zero.shape != (groups, columns)):
        raise FormatError(f"{layer}: qweight {word.shape}, qzeros {zero.shape if zero else 'missing'} and scales {scale.shape} are not those of one "
                          "layer of 4 bits")
    if inputs // groups != (inputs if size == -1 else size):
        raise FormatError(f"{layer} has groups of {inputs // groups} of its {inputs} inputs, and config.json says group_size={size}")
