"""The other direction: a directory of compressed-tensors, ours or anyone's, as QTensors: the start of further training.

    pack-quantized          integers of 1 to 8 bits, a dense stream                         step a tensor, channel, group or block; zeros
    int-quantized           integers, one byte each                                         the same
    float-quantized         E4M3                                                            step a tensor, channel, group or block
    naive-quantized         either, one byte each
    mxfp4-pack-quantized    E2M1, a power of two for 32
    nvfp4-pack-quantized    E2M1, E4M3 for 16 over one fp32 number

Codes, steps and zeros are those of the file, and `QTensor.dequantize()` is what `read` gives, bit for bit. One reader's answer is rounded once more:
of NVFP4 the package returns bf16, and its bits are those of `dequantize().bfloat16()`. The file divides by its global scale; where that is a power of
two (ours), both levels are kept, else each step is the fp32 number that the division gives, which is what the reader multiplies with, and such a
tensor is not written again as NVFP4.

Which layer is of which config group is decided as the package does: the layer's own name first, then a regular expression, then its class. What is
said of a layer and cannot be kept is refused by name, never passed over: sparsity, transforms, quantized outputs and caches, reordered columns
(weight_g_idx), input quantizers other than one step a token (found at run time) or a tensor. So is the packing of versions before 0.18 for 3, 5, 6
and 7 bits, which leaves bits of each word unused: it is told by the number of words in a row. (Rows so short that both packings need as many words,
11 to 20 inputs of 3 bits, are read as dense.)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.error import FormatError
from ...core.floats import Float
from ...core.grain import Block, Grain, Group, PerChannel, PerTensor, PerToken
from ...core.grid import Grid, Uniform
from ...core.qtensor import QTensor, unpack_bits
from ...core.quantizer import Quant
from ...core.scale import AbsMax, Learned, MinMax
from ..checkpoint import Signal
from ..folder import said, skeleton
from .fitting import NAME
from .kinds import POWER
from .readers import config_of, tensors_of

INTEGERS = ("pack-quantized", "int-quantized", "naive-quantized")
FLOATS = ("float-quantized", "naive-quantized")
FORMATS = (*INTEGERS, "float-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized")
STEPS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
PARTS = {"weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_global_scale"}
REFUSED = {"kv_cache_scheme": "a quantized key/value cache", "transform_config": "transforms of weights", "sparsity_config": "sparsity",
           "moe_sparsity_config": "sparsity of experts"}


def holds(path: str | Path) -> bool:
    """Whether a directory is of this format, by its config.json alone."""
    return (said(path) or {}).get("quant_method") == NAME


def qtensors(path: str | Path) -> dict[str, QTensor | Tensor]:
    """Hugging Face name -> QTensor of every quantized weight, plain tensors as they are.

    Raises:
        FormatError: what is not this format, is truncated, contradicts itself or has no QTensor form; names the file and the tensor.
    """
    schemes, tensors = _schemes(path), tensors_of(path)
    out: dict[str, QTensor | Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if f"{layer}.weight_scale" not in tensors:
            if part in PARTS and layer in schemes:
                raise FormatError(f"{path}: {layer} is quantized by config.json, and the file has its {part} without weight_scale")
            out[name] = tensor
        elif part.startswith("weight"):
            parts.setdefault(layer, {})[part] = tensor
        elif not part.startswith("input_"):                       # inputs() reads those
            out[name] = tensor
    for layer, mine in parts.items():
        if layer not in schemes:
            raise FormatError(f"{path}: {layer} has a weight_scale, and no config group has that layer; the files are not of one save")
        if extra := set(mine) - PARTS:
            raise FormatError(f"{path}: {layer} has {', '.join(sorted(extra))}, which has no QTensor form (weight_g_idx: columns in another order)")
        out[f"{layer}.weight"] = _decoded(f"{path}: {layer}", mine, *schemes[layer])
    return out


def inputs(path: str | Path) -> dict[str, Signal]:
    """Layer -> how its input is quantized, for the layers where it is.

    Raises:
        FormatError: an input quantizer that has no form of ours, named; see `qtensors`.
    """
    schemes, tensors = _schemes(path), tensors_of(path, lambda name: name.rpartition(".")[2].startswith("input_"))
    out = {}
    for layer, (_, group) in schemes.items():
        if group.get("output_activations"):
            raise FormatError(f"{path}: {layer} has quantized outputs, which qatlas does not read")
        if group.get("input_activations"):
            found = {part: tensors[name] for part in ("input_scale", "input_zero_point") if (name := f"{layer}.{part}") in tensors}
            out[layer] = _signal(f"{path}: the input of {layer}", group["input_activations"], found)
    if lost := [name for name in tensors if name.rpartition(".")[0] not in out]:
        raise FormatError(f"{path} holds {lost[0]}, and config.json quantizes no input there; the files are not of one save")
    return out


def _schemes(path: str | Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Layer -> (format, config group), for every layer that config.json quantizes."""
    config = config_of(path)
    said = config["quantization_config"]
    for key, what in REFUSED.items():
        if said.get(key) and said[key] != {"format": "dense"}:
            raise FormatError(f"{path}: config.json says {key}, {what}, which qatlas does not read")
    groups = said["config_groups"]
    for name, group in groups.items():
        if not (isinstance(group, dict) and isinstance(group.get("targets"), list) and isinstance(group.get("weights"), dict)):
            raise FormatError(f"{path}: config group {name} lists no targets with weights; presets and groups of inputs alone are not read")
    ignore = said.get("ignore") or []
    out = {}
    for layer, module in skeleton(config, NAME).items():
        if not isinstance(module, nn.Linear | nn.Embedding) or any(rank(layer, module, target) for target in ignore):
            continue
        ranked = [(found, i) for i, group in enumerate(groups.values()) for target in group["targets"] if (found := rank(layer, module, target))]
        if ranked:
            group = list(groups.values())[min(ranked)[1]]
            out[layer] = (str(group.get("format") or said.get("format")), group)
    return out


def rank(layer: str, module: nn.Module, target: str) -> int:
    """How a target means a layer: 1 by its name, 2 by a regular expression, 3 by its class, 0 not at all.

    >>> layer = nn.Linear(2, 2)
    >>> [rank("mlp.up", layer, target) for target in ("mlp.up", "re:.*up", "Linear", "mlp.down")]
    [1, 2, 3, 0]
    """
    if target.startswith("re:"):
        return 2 * bool(re.match(target.removeprefix("re:"), layer))
    return 1 if target == layer else 3 * (target in {cls.__name__ for cls in type(module).__mro__})


def _decoded(where: str, part: dict[str, Tensor], form: str, group: dict[str, Any]) -> QTensor:
    """One layer's tensors -> its weight."""
    said = group["weights"]
    bits, kind, symmetric = said.get("num_bits", 8), said.get("type", "int"), said.get("symmetric", True)
    if form not in FORMATS:
        raise FormatError(f"{where} is stored as {form!r}; qatlas reads {', '.join(FORMATS)}")
    if not symmetric and (kind != "int" or "weight_zero_point" not in part):
        raise FormatError(f"{where} is said to be asymmetric, and " + ("has no weight_zero_point" if kind == "int" else "holds floating-point codes"))
    if "fp4" in form:
        return _four(where, part, form, said)
    if kind == "int" and form in INTEGERS and isinstance(bits, int) and 1 <= bits <= 8:
        codes, grid = _integers(where, part, bits), Uniform(bits)
        return _joined(where, codes, part, said, grid, None if symmetric and "weight_zero_point" not in part else _zeros(where, part, codes, bits))
    if kind == "float" and form in FLOATS and bits == 8:
        weight = _of(where, part, "weight", torch.float8_e4m3fn)
        codes = weight.contiguous().view(torch.uint8)
        if bool((codes & 127 == 127).any()):
            raise FormatError(f"{where}.weight holds NaN")
        return _joined(where, codes, part, said, Float(4, 3), None)
    raise FormatError(f"{where} is said to be {kind} of {bits} bits, which {form} does not hold")


def _of(where: str, part: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> Tensor:
    tensor = part.get(name)
    if tensor is None:
        raise FormatError(f"{where} has no {name}; it has {', '.join(part)}")
    if tensor.dtype != dtype or (tensor.dim() != 2 if shape is None else tuple(tensor.shape) != shape):
        raise FormatError(f"{where}.{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not {dtype} of shape {shape or '(out, in)'}")
    return tensor


def _integers(where: str, part: dict[str, Tensor], bits: int) -> Tensor:
    """Unsigned codes (out, in)."""
    half = 2 ** (bits - 1)
    if "weight_packed" not in part:
        q = _of(where, part, "weight", torch.int8).to(torch.int16)
        if q.numel() and not -half <= int(q.min()) <= int(q.max()) < half:
            raise FormatError(f"{where}.weight holds {int(q.min())} .. {int(q.max())}, which are no integers of {bits} bits")
        return (q + half).to(torch.uint8)
    packed = _of(where, part, "weight_packed", torch.int32)
    told = part.get("weight_shape")
    shape = tuple(int(n) for n in told.flatten()) if told is not None and told.numel() == 2 and not told.is_floating_point() else ()
    if len(shape) != 2 or min(shape) < 1:
        raise FormatError(f"{where}.weight_shape says no shape (out, in): {None if told is None else told.tolist()}")
    return from_words(f"{where}.weight_packed", packed, bits, shape)


def from_words(where: str, packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """(rows, words) int32 -> codes (rows, n), the inverse of `layout.words`."""
    rows, n = shape
    if tuple(packed.shape) != (rows, -(-n * bits // 32)):
        loose = tuple(packed.shape) == (rows, -(-n // (32 // bits)))
        why = f"leaves bits of its words unused, the packing of compressed-tensors before 0.18 for {bits} bits; write it anew with a later one" \
            if loose else f"has {tuple(packed.shape)} words"
        raise FormatError(f"{where} {why}; a dense stream of {bits} bits for {shape} has {(rows, -(-n * bits // 32))} words")
    stream = packed.contiguous().view(torch.uint8)
    return unpack_bits(stream[:, : -(-n * bits // 8)].contiguous(), bits, shape)


def _zeros(where: str, part: dict[str, Tensor], codes: Tensor, bits: int) -> Tensor | None:
    """Zeros as the steps, signed; None where all are 0."""
    zero, scale, half = part["weight_zero_point"], part["weight_scale"], 2 ** (bits - 1)
    if zero.dtype == torch.int32 and "weight_packed" in part and scale.dim() == 2:
        return from_words(f"{where}.weight_zero_point, transposed,", zero.T.contiguous(), bits, (scale.shape[1], codes.shape[0])).T.float() - half
    if zero.is_floating_point() or zero.shape != scale.shape:
        raise FormatError(f"{where}.weight_zero_point is {zero.dtype} of shape {tuple(zero.shape)}, and weight_scale has shape {tuple(scale.shape)}")
    z = zero.float()
    if z.numel() and not -half <= float(z.min()) <= float(z.max()) < half:
        raise FormatError(f"{where}.weight_zero_point holds {int(z.min())} .. {int(z.max())}, which are no integers of {bits} bits")
    return z


def _joined(where: str, codes: Tensor, part: dict[str, Tensor], said: dict[str, Any], grid: Grid, zero: Tensor | None) -> QTensor:
    """Codes with their steps."""
    scale = part["weight_scale"]
    if scale.dtype not in STEPS or not bool(torch.isfinite(scale).all()):
        raise FormatError(f"{where}.weight_scale is {scale.dtype}" + (", with NaN or infinity" if scale.dtype in STEPS else ""))
    grain, shape = _grain(where, tuple(codes.shape), tuple(scale.shape), said)
    if zero is not None and said.get("symmetric", True) and bool(zero.any()):
        raise FormatError(f"{where} is said to be symmetric, and its weight_zero_point is not zero")
    zero = None if zero is None or said.get("symmetric", True) else zero.reshape(shape).contiguous()
    return QTensor(codes, scale.float().reshape(shape), zero, None, grid, grain, STEPS[scale.dtype])


def _grain(where: str, shape: tuple[int, ...], steps: tuple[int, ...], said: dict[str, Any]) -> tuple[Grain, tuple[int, ...]]:
    """The grain of a strategy, and the shape of its steps here."""
    size = said.get("group_size")
    if size is not None and type(size) is not int:
        raise FormatError(f"{where}: the config says group_size={size!r}, which is no whole number")
    plain = "group" if size and size > 0 else "channel" if size == -1 else "tensor"
    strategy = said.get("strategy") or plain
    block = list(said.get("block_structure") or [])
    grain: Grain | None = None
    want: tuple[int, ...] = ()
    if strategy == "tensor":
        grain, want = PerTensor(), (1,)
        steps = (1,) if steps in ((), (1,), (1, 1)) else steps
    elif strategy == "channel" or (strategy == "group" and size == -1):
        grain, want = PerChannel(), (shape[0],)
        steps = (shape[0],) if steps == (shape[0], 1) else steps
    elif strategy in ("group", "tensor_group") and isinstance(size, int) and size > 0 and shape[1] % size == 0:
        grain, want = Group(size), (shape[0], shape[1] // size)
    elif strategy == "block" and len(block) == 2 and min(block) > 0 and shape[0] % block[0] == 0 == shape[1] % block[1]:
        grain, want = Block(*block), (shape[0] // block[0], shape[1] // block[1])
    if grain is None:
        raise FormatError(f"{where}: one step a {strategy} (group_size {size}, block_structure {block}) of a weight {shape} has no QTensor "
                          "form; groups and blocks must divide it")
    if steps != want:
        raise FormatError(f"{where}.weight_scale has shape {steps}; one step a {strategy} of a weight {shape} has {want}")
    return grain, want


def _four(where: str, part: dict[str, Tensor], form: str, said: dict[str, Any]) -> QTensor:
    """E2M1: two levels, or powers of two."""
    packed, size = _of(where, part, "weight_packed", torch.uint8), 16 if "nv" in form else 32
    shape = (packed.shape[0], packed.shape[1] * 2)
    if shape[1] % size or said.get("group_size") not in (None, size):
        raise FormatError(f"{where}: {form} has one step for {size} inputs; the weight has {shape[1]}, and group_size is {said.get('group_size')}")
    codes = unpack_bits(packed.contiguous(), 4, shape)
    groups = (shape[0], shape[1] // size)
    if form.startswith("mx"):
        power = _of(where, part, "weight_scale", torch.uint8, groups).int() - 127
        if bool((power > 125).any()):
            raise FormatError(f"{where}.weight_scale holds the exponent {int(power.max())}: NaN, or values beyond fp32")
        return QTensor(codes, torch.ldexp(torch.ones(groups), power), None, None, Float(2, 1), Group(size), POWER)
    inner, top = _of(where, part, "weight_scale", torch.float8_e4m3fn, groups), part.get("weight_global_scale")
    if top is None or top.numel() != 1 or not bool(torch.isfinite(top).all()) or float(top) <= 0:
        raise FormatError(f"{where}.weight_global_scale is no positive number: {None if top is None else top.tolist()}")
    level = QTensor(inner.contiguous().view(torch.uint8), (1 / top.float()).reshape(1), None, None, Float(4, 3), PerTensor(), POWER)
    steps = inner.float() / top.float().reshape(1)                # (out, in / 16), in the reader's order
    if bool(((level.codes & 127) == 127).any()) or not bool(torch.isfinite(steps).all()):
        raise FormatError(f"{where}.weight_scale holds NaN, or infinity when divided by the global scale")
    two = bool(torch.frexp(top.float()).mantissa.eq(0.5).all()) and torch.equal(level.dequantize(), steps)
    return QTensor(codes, level if two else steps, None, None, Float(2, 1), Group(size))


def _signal(where: str, said: dict[str, Any], found: dict[str, Tensor]) -> Signal:
    """What `input_activations` says."""
    bits, kind, symmetric, dynamic = said.get("num_bits", 8), said.get("type", "int"), said.get("symmetric", True), said.get("dynamic", False)
    strategy = said.get("strategy") or ("token" if dynamic else "tensor")
    good = (kind == "int" and isinstance(bits, int) and 2 <= bits <= 8) or (kind == "float" and bits == 8)
    if not good or strategy not in ("token", "tensor") or dynamic not in (True, False) or (dynamic and not symmetric) \
            or (not dynamic and strategy != "tensor") or (kind == "float" and not symmetric):
        raise FormatError(f"{where} is quantized by {said}, which has no form of ours: integers of 2 to 8 bits or E4M3, symmetric with one step a "
                          "token or a tensor found at run time, or one stored step a tensor")
    grid: Grid = Uniform(bits) if kind == "int" else Float(4, 3)
    if dynamic:
        return Signal(Quant(grid, PerToken() if strategy == "token" else PerTensor(), AbsMax(reach=(2**bits - 1) / 2 if kind == "int" else None)))
    scale, zero = found.get("input_scale"), found.get("input_zero_point")
    if scale is None or scale.numel() != 1 or not bool(torch.isfinite(scale.float()).all()) or float(scale) <= 0:
        raise FormatError(f"{where} has one stored step, and input_scale is {None if scale is None else scale.flatten()[:4].tolist()}")
    if symmetric:
        return Signal(Quant(grid, PerTensor(), Learned(AbsMax())), scale.float().reshape(1))
    if zero is None or zero.numel() != 1 or not grid.low <= float(zero) <= grid.high:
        raise FormatError(f"{where} has a zero point, and input_zero_point is {None if zero is None else zero.flatten()[:4].tolist()}")
    return Signal(Quant(grid, PerTensor(), Learned(MinMax())), scale.float().reshape(1), zero.float().reshape(1))


__all__ = ["NAME", "holds", "inputs", "qtensors"]
