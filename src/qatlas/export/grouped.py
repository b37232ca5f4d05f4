"""Integers in groups along the inputs, with fp16 steps and zeros of as many bits: what GPTQ and AWQ have in common. Each packs them in its own way.

    w = s (u - z)       u and z unsigned, 0 ... 2^bits - 1; s fp16; one s and one z for each group of 32, 64, 128 or all inputs of an output

What is exact:

    the grid    integers over a power of two (integers.py), moved so that the lowest is 0. Without a zero of its own a layer has one all the same:
                where the grid's 0 lies, 2^(bits - 1) around zero
    the grain   a step a channel, or groups of a multiple of 32; a coarser one repeats its step. A file has one group size: all channels, or the
                largest of 128, 64, 32 that divides the groups of every layer
    the step    fp16. `fit` gives a Quant that type; a step that was trained in another must be an fp16 number
    the zero    whole, on the grid; an offset in values has no place
    the values  at most 65504, since engines multiply in fp16

Only matrices inside the repeated blocks of a model: readers replace those, and look for a head in full precision. Inputs stay in full precision; who
trained with quantized ones is refused, since no reader would compute what was trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.error import FormatError, QuantError, unknown
from ..core.floats import Float
from ..core.grain import Group, PerChannel, Scattered
from ..core.grid import Uniform
from ..core.qtensor import QTensor
from ..core.quantizer import Quant
from ..core.scale import AbsMax
from .checkpoint import Checkpoint
from .folder import check_names, plain, skeleton
from .integers import TIMES, each, integers, sharing

GROUPS = (128, 64, 32)
LARGEST = 65504.0                                                 # of fp16
SMALLEST = 2.0**-24


@dataclass(frozen=True)
class Kind:
    """A target. form: the format's name. bits: of a code and of a zero. first: the lowest zero that can be stored. outputs: the number of outputs is
    a multiple of it. classes: of layers, by name. own: the Quant that it would choose itself."""

    form: str
    bits: int
    own: Quant
    first: int = 0
    outputs: int = 32
    classes: tuple[str, ...] = ("Linear",)


def own(bits: int) -> Quant:
    """Groups of 128 around zero, the most common of these files."""
    return Quant(Uniform(bits), Group(128), AbsMax(dtype="float16"))


def pick(kinds: Mapping[str, Kind], form: str, target: str) -> Kind:
    """The kind of a target.

    Raises:
        FormatError: there is none of that name.
    """
    if target not in kinds:
        raise FormatError(unknown("target", f"{form}:{target}", [f"{form}:{name}" for name in kinds]))
    return kinds[target]


def fit(quant: Quant, target: str, kinds: Mapping[str, Kind], shape: tuple[int, ...], body: bool) -> Quant:
    """The Quant with its step in fp16, all else kept.

    Raises:
        FormatError: what the target cannot hold, with the reason and the targets that can.
    """
    form = next(iter(kinds.values())).form
    kind = pick(kinds, form, target)
    if not body:
        raise FormatError(f"{form} quantizes the layers of the repeated blocks; its readers want embeddings and head in full precision. Keep them: "
                          "keep_full(Role.EMBEDDING, Role.HEAD), or weight=None in --rules")
    moved = _moved(quant, kind)
    if (reason := why_not(moved, kind, shape)) is None:
        return moved
    able = [f"{form}:{name}" for name, other in kinds.items() if why_not(_moved(quant, other), other, shape) is None]
    raise FormatError(f"{form}:{target} cannot hold a tensor of shape {tuple(shape)} under {quant.grid}, {quant.grain}: {reason}.\n"
                      f"  targets that hold these numbers: {', '.join(able) or 'none'}; nearest scheme for {form}:{target}: w{kind.bits}-g128")


def fit_input(quant: Quant | None, kind: Kind, weight: Any, module: str) -> None:
    """Inputs stay in full precision.

    Raises:
        FormatError: a quantized input, or a class of layers that has no place in the format.
    """
    if quant is not None:
        raise FormatError(f"{kind.form} holds weights alone, and its readers compute with inputs in full precision; leave this input in full "
                          "precision, or take a format that holds inputs, such as compressed-tensors:w4a8 or onnx:int8")
    if weight is not None and module not in kind.classes:
        raise FormatError(f"{kind.form} quantizes {' and '.join(kind.classes)} alone, this layer is a {module}; keep it in full precision: "
                          "keep_full(...), or weight=None for it in --rules")


def why_not(tensor: Any, kind: Kind, shape: tuple[int, ...] | None = None) -> str | None:
    """Why the kind cannot hold a weight, a Quant or a QTensor of `shape` (out, in), or None. A Quant is judged by what it says, a QTensor by its
    values."""
    shape = tuple(tensor.shape if shape is None else shape)
    grid = getattr(tensor, "grid", None)
    if grid is None:
        return f"a {type(tensor).__name__} is made of several parts, and a layer has one step and one code an element"
    if isinstance(grid, Float) or grid.bits > 8 or integers(grid, kind.bits) is None:
        return f"the values of {grid} are no integers of {kind.bits} bits, nor those over a power of two"
    if getattr(grid, "signed", True) is None:
        return f"{grid} has not settled whether it is signed; weights are, write signed=True"
    return _shape(tensor, shape, kind) or _zero(tensor, kind) or _step(tensor, kind)


def plan(checkpoint: Checkpoint, target: str, kinds: Mapping[str, Kind]) -> dict[str, str]:
    """The name of each tensor -> the target, or "full" for those in full precision.

    Raises:
        FormatError: an architecture that transformers cannot build, tensors that are not its, a tensor that the target cannot hold.
    """
    form = next(iter(kinds.values())).form
    kind = pick(kinds, form, target)
    modules = skeleton(checkpoint.config, form)
    check_names(modules, checkpoint)
    out = {}
    for name, tensor in checkpoint.tensors.items():
        layer = name.removesuffix(".weight")
        out[name] = "full" if isinstance(tensor, Tensor) else target
        if isinstance(tensor, Tensor):
            if not bool(torch.isfinite(tensor).all()):
                raise FormatError(f"{name} holds NaN or infinity")
            continue
        if (cls := type(modules.get(layer)).__name__) not in kind.classes:
            raise FormatError(f"{name} belongs to a {cls}; {form} quantizes {' and '.join(kind.classes)} alone: keep it in full precision")
        if not inside(layer):
            raise FormatError(f"{name} stands outside of the repeated blocks, where the readers of {form} want full precision: keep it so")
        if (reason := why_not(tensor, kind)) is not None:
            raise FormatError(f"{form}:{target} cannot hold {name}, shape {tuple(getattr(tensor, 'shape', ()))}: {reason}")
    if checkpoint.inputs:
        raise FormatError(f"{next(iter(checkpoint.inputs))} quantizes its input, and {form} holds weights alone; compressed-tensors holds both")
    if checkpoint.signals:
        raise FormatError(f"{checkpoint.signals[0]} is a quantized signal, and {form} holds weights alone")
    return out


def inside(layer: str) -> bool:
    """Whether a layer lies in a repeated block, which has a number in its name.

    >>> inside("model.layers.0.mlp.up_proj"), inside("lm_head")
    (True, False)
    """
    return re.search(r"(^|\.)\d+\.", layer) is not None


def size(parts: Iterable[QTensor]) -> int:
    """The group size that a file says: -1 where every layer has one step a channel, else the largest that serves all."""
    found = [(sharing(part.grain, tuple(part.shape)) or 1, part.shape[1]) for part in parts]
    if all(n == width for n, width in found):
        return -1
    return next(group for group in GROUPS if all(n % group == 0 for n, _ in found))


def stored(checkpoint: Checkpoint, form: str, store: Callable[..., Any]) -> tuple[dict[str, QTensor], int, dict[str, Tensor]]:
    """Layer -> QTensor, the group size of the file, and its tensors: what is quantized as `store(tensor, group=size)` names it, the rest plain.

    Raises:
        FormatError: nothing is quantized.
    """
    parts = {name.removesuffix(".weight"): tensor for name, tensor in checkpoint.tensors.items() if isinstance(tensor, QTensor)}
    if not parts:
        raise FormatError(f"no layer is quantized, so there is nothing that {form} could say of this model")
    group = size(parts.values())
    out = {name: plain(tensor) for name, tensor in checkpoint.tensors.items() if isinstance(tensor, Tensor)}
    for layer, tensor in parts.items():
        out |= {f"{layer}.{part}": value for part, value in store(tensor, group=group)._asdict().items()}
    return parts, group, out


def middle(tensor: QTensor, bits: int) -> bool:
    """Whether the zeros of a layer all lie in the middle, at 2^(bits - 1): what these formats call symmetric."""
    return tensor.zero is None and integers(tensor.grid, bits) in [(k, 0) for k in TIMES]


def store(tensor: QTensor, kind: Kind, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes u (out, in) uint8, zeros z (out, groups) uint8, steps s (out, groups) fp16, of a QTensor that `why_not` let through."""
    (k, m), half = integers(tensor.grid, kind.bits) or (1, 0), 2 ** (kind.bits - 1)
    width = tensor.shape[1] if group == -1 else group
    codes = (tensor.values() * k - m + half).to(torch.uint8).cpu()
    place = torch.zeros_like(tensor.steps) if tensor.zero is None else tensor.zero
    zeros = (each(tensor, place, width) * k - m + half).to(torch.uint8)
    return codes, zeros, (each(tensor, tensor.steps, width) / k).half()


def restore(codes: Tensor, zeros: Tensor, steps: Tensor, bits: int, order: tuple[int, ...] = ()) -> QTensor:
    """The QTensor of a layer in a file: `store`'s three (the steps in the file's type), and the order in which inputs are grouped. Zeros that all lie
    in the middle are none: the grid is then the signed one."""
    width, groups = codes.shape[1], steps.shape[1]
    middle = bool((zeros == 2 ** (bits - 1)).all())
    grain = PerChannel() if groups == 1 else Scattered(width // groups, order) if order else Group(width // groups)
    scale, zero = (steps.float(), None if middle else zeros.float())
    if groups == 1:
        scale, zero = scale[:, 0], None if zero is None else zero[:, 0]
    return QTensor(codes, scale.contiguous(), None if zero is None else zero.contiguous(), None, Uniform(bits, middle), grain,
                   str(steps.dtype).removeprefix("torch."))


def _moved(quant: Quant, kind: Kind) -> Quant:
    scale = quant.scale
    k = (integers(quant.grid, kind.bits) or (1, 0))[0] if quant.grid.bits <= 8 and not isinstance(quant.grid, Float) else 1
    if scale.dtype not in ("float32", "bfloat16", "float16") or (scale.dtype == "float16" and k == 1):
        return quant
    return quant.but(scale=scale.but(dtype="float16", floor=scale.floor if k == 1 else max(scale.floor or 0.0, SMALLEST * k)))


def _shape(tensor: Any, shape: tuple[int, ...], kind: Kind) -> str | None:
    if len(shape) != 2:
        return f"only matrices (out, in) are layers of this format, this one has shape {shape}"
    if shape[0] % kind.outputs or shape[1] % 32:
        return f"its shape {shape} (out, in) is no multiple of ({kind.outputs}, 32), as the words of this format want it"
    try:
        n = sharing(tensor.grain, shape)
    except QuantError as error:
        return str(error)
    good = n is not None and n % 32 == 0
    return None if good else f"{tensor.grain} does not give each 32 inputs one step; take Group(128), Group(64), Group(32) or PerChannel()"


def _zero(tensor: Any, kind: Kind) -> str | None:
    place = tensor.scale.measure(torch.linspace(-1.0, 1.0, 32).reshape(1, 32), tensor.grid) if isinstance(tensor, Quant) else tensor
    if place.offset is not None:
        return "a float offset in values has no place here; take a whole zero point, MinMax(), or none, AbsMax()"
    k, m = integers(tensor.grid, kind.bits) or (1, 0)
    if place.zero is not None and isinstance(tensor, Quant):
        return None                                               # its values will say
    z = (torch.zeros(1) if place.zero is None else place.zero) * k - m + 2 ** (kind.bits - 1)
    if not bool(((z.round() == z) & (z >= 0) & (z < 2**kind.bits)).all()):
        return f"some zero points are no integers of {kind.bits} bits"
    if low := int((z < kind.first).sum()):
        return f"{low} of {z.numel()} groups have their zero at code 0, which this format stores as -1; {kind.form}:w{kind.bits}_v2 holds them"
    return None


def _step(tensor: Any, kind: Kind) -> str | None:
    k = (integers(tensor.grid, kind.bits) or (1, 0))[0]
    if isinstance(tensor, Quant):
        if tensor.scale.nested is not None:
            return "the steps are themselves quantized, and this format holds plain ones"
        exact = tensor.scale.dtype in ("float16", "float8_e4m3fn")
        return None if exact else f"the step is trained as {tensor.scale.dtype}, and this format stores fp16; `fit` moves it"
    steps = tensor.steps / k
    if not torch.equal(steps.half().to(steps.dtype), steps):
        return "some steps are no fp16 numbers; train with the target"
    if float(tensor.dequantize().abs().max()) > LARGEST:
        return f"some values are beyond {LARGEST:g}, the largest number of fp16, in which engines multiply"
    return None
