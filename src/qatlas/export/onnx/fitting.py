"""Which trained numbers ONNX holds exactly.

DequantizeLinear stands for s (q - z): q and z of one integer type, s in fp32, one for the tensor, for each index of an axis, or for each block along
an axis. Three questions decide for a weight:

1. The grid. With a power of two k such that all k v are integers, s (v - z) = (s / k) (k v - k z), and both sides are the same fp32 number. So the
   grids -1.5 -0.5 0.5 1.5 and E2M1 are integers too. What counts is the grid, not the values that happen to occur.
2. The zero. Times k it must be an integer of the same type. An offset in values has no place: s v + m and s (v - z) differ in the last bit.
3. The grain. All have a place: a tensor, an axis, groups, and tiles, whose step is repeated for each of their rows.

Steps are trained in fp32, fp16 or less, and fp32 holds them all.

An activation is quantized by QuantizeLinear, clamp(round(x / s) + z), with a constant s. So its step must be static, and its grid the integers.
Fewer than 8 bits are told by a Clip in front of an 8-bit QuantizeLinear, which more engines read than activations of 4 bits. (We round x / s + z,
QuantizeLinear x / s alone: with an odd zero an exact tie falls on the other side.)

MatMulNBits stands for the same s (q - z) of a matrix, with one step for each block of 16 to 256 inputs (nbits.py). Under a -matmulnbits target every
matrix is held to that; what becomes no such product lies in DequantizeLinear, in 4 or 8 bits, so that the file keeps to opset 21.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...core.error import FormatError, QuantError, unknown
from ...core.grain import Block, Grain, Group, PerChannel, PerTensor
from ...core.grid import Grid, Ternary, Uniform
from ...core.quantizer import Quant
from ...core.scale import AbsMax, AbsMean
from ..checkpoint import Signal

BITS = {"int8": (8,), "int4": (4, 8), "int2": (2, 4, 8)}
NBITS = "-matmulnbits"                                            # the middle of a target whose products are MatMulNBits
ONLY = "-weights"                                                 # the end of a target that leaves the quantizers of activations out
BLOCKS, LEVEL = (256, 128, 64, 32, 16), 1                         # of MatMulNBits: block sizes; the accuracy level, fp32
_OWN: dict[str, Quant | None] = {"int8": Quant(Uniform(8), PerChannel(), AbsMax()), "int4": Quant(Uniform(4), Group(32), AbsMax()),
                                 "int2": Quant(Ternary(), PerChannel(), AbsMean())}
TARGETS: dict[str, Quant | None] = {f"{name}{end}": quant for name, quant in _OWN.items() for end in ("", ONLY, NBITS, NBITS + ONLY)}
OPSETS = {name: 25 if name in ("int2", f"int2{ONLY}") else 21 for name in TARGETS}
SCHEMES = {"int8": "w8", "int4": "w4-g32", "int2": "w1.58"}
TIMES = tuple(2**i for i in range(8))
NORMAL = 2.0**-118                                                # from here up, dividing an fp32 number by k is exact


class Kind(NamedTuple):
    """An integer type of ONNX, and the power of two that makes a grid's values its integers."""

    bits: int
    signed: bool
    times: int

    @property
    def name(self) -> str:
        """As onnx calls it."""
        return f"{'' if self.signed else 'U'}INT{self.bits}"


def fit(quant: Quant, target: str, shape: tuple[int, ...], body: bool = True) -> Quant:
    """The Quant as it is, if the target holds it: grid, grain and the type of the step all have a place.

    Raises:
        FormatError: what the target cannot hold, with the reason and the targets that can.

    >>> from qatlas.core.scheme import weight
    >>> fit(weight(4), "int4", (8, 64)) == weight(4)
    True
    """
    reason = why_not(quant, target, shape)
    if reason is None:
        return quant
    able = [name for name in TARGETS if why_not(quant, name, shape) is None]
    raise FormatError(f"onnx:{target} cannot hold a tensor of shape {tuple(shape)} under {quant.grid}, {quant.grain}: {reason}.\n"
                      f"  targets that hold these numbers: {', '.join(f'onnx:{name}' for name in able) or 'none'}; "
                      f"nearest scheme for onnx:{target}: {SCHEMES[ints(target)]}")


def why_not(tensor: Any, target: str, shape: tuple[int, ...] | None = None) -> str | None:
    """Why the target cannot hold a Quant or a QTensor of `shape` (out, ...), or None.

    >>> from qatlas.core.scale import MinMax
    >>> why_not(Quant(Uniform(4), scale=MinMax(zero="offset")), "int4", (8, 64))
    'a float offset has no place in DequantizeLinear; take MinMax(zero="integer"), or a scale without one, such as AbsMax()'
    """
    known(target)
    shape = tuple(tensor.shape if shape is None else shape)
    if getattr(tensor, "grid", None) is None:
        return f"a {type(tensor).__name__} is made of several parts, and DequantizeLinear has one step and one code an element"
    if tensor.grid.bits > 8:
        return f"{tensor.grid} takes {tensor.grid.bits} bits, and DequantizeLinear takes at most 8 from a weight of ours"
    if getattr(tensor.grid, "signed", True) is None:
        return f"{tensor.grid} has not settled whether it is signed; weights are, write signed=True"
    zeros = _zeros(tensor)
    if zeros is None:
        return "a float offset has no place in DequantizeLinear; take MinMax(zero=\"integer\"), or a scale without one, such as AbsMax()"
    found = kind(tensor.grid, target, zeros, product=len(shape) == 2)
    if found is None:
        return f"the values of {tensor.grid} are not integers of {BITS[ints(target)][-1]} bits, nor those over a power of two" + (
            "" if zeros.numel() == 0 else f", with a zero between {float(zeros.min()):g} and {float(zeros.max()):g}")
    try:
        tensor.grain.scale_shape(shape)
    except QuantError as error:
        return str(error)
    if NBITS in target and len(shape) == 2 and width(tensor.grain, shape[1]) is None:
        return (f"{tensor.grain} has no place in MatMulNBits, whose steps serve blocks of 16 inputs or a multiple of that; take a group of 16, "
                "32, 64, 128 or 256, or one step a channel")
    if not isinstance(tensor, Quant) and found.times > 1 and bool((tensor.steps.abs() < NORMAL).any()):
        return f"a step below {NORMAL:.0e} divided by {found.times} is no exact fp32 number"
    return None


def ints(target: str) -> str:
    """The integers that a target names.

    >>> ints("int4-matmulnbits-weights")
    'int4'
    """
    return target.partition("-")[0]


def width(grain: Grain, inputs: int) -> int | None:
    """The largest block of MatMulNBits that never spans two steps, of a matrix with so many inputs; None where there is none.

    >>> width(Group(96), 192), width(PerChannel(), 192), width(PerChannel(), 24), width(Group(8), 192)
    (32, 64, 16, None)
    """
    if isinstance(grain, PerTensor) or grain == PerChannel():
        return next((block for block in BLOCKS if inputs % block == 0), BLOCKS[-1])
    size = grain.size if isinstance(grain, Group) else grain.cols if isinstance(grain, Block) else 1
    return next((block for block in BLOCKS if size % block == 0), None)


def kind(grid: Grid, target: str, zeros: torch.Tensor, product: bool = False) -> Kind | None:
    """The smallest type of the target that holds the grid and its zeros; None where there is none. product: of a matrix that is multiplied with.

    >>> kind(Uniform(3), "int4", torch.empty(0)), kind(Uniform(4, False), "int8", torch.empty(0))
    (Kind(bits=4, signed=True, times=1), Kind(bits=8, signed=True, times=1))
    """
    values = torch.cat([grid.values().float().cpu(), zeros.float().flatten().cpu()])
    few = not product and NBITS in target                         # INT2 needs opset 25
    for bits in (bits for bits in BITS[ints(target)] if bits > 2 or not few):
        for signed in (True, False):
            low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
            for k in TIMES:
                v = values * k
                if bool((v.round() == v).all()) and v.min() >= low and v.max() <= high:
                    return Kind(bits, signed, k)
    return None


def why_not_signal(signal: Signal | Quant, target: str) -> str | None:
    """Why the target cannot hold a quantizer of activations, or None. A target that leaves them out refuses none.

    >>> from qatlas.core.scheme import scheme
    >>> why_not_signal(scheme("w4a8").input, "int8")
    'AbsMax gives each token a step of its own as it comes, and the step of QuantizeLinear is a constant of the file'
    >>> why_not_signal(scheme("w4a8-static").input, "int8") is None
    True
    """
    known(target)
    if target.endswith(ONLY):
        return None
    quant = signal if isinstance(signal, Quant) else signal.quant
    if not quant.plain:
        return f"{type(quant).__name__} does more than round by one step and zero, and QuantizeLinear does no more"
    if quant.scale.keeps == "nothing":
        each = "input" if quant.grain == PerTensor() else "token"
        return (f"{type(quant.scale).__name__} gives each {each} a step of its own as it comes, and the step of QuantizeLinear is a constant of "
                "the file")
    if not isinstance(quant.grid, Uniform) or quant.bits > 8 or quant.refit:
        return f"{quant.grid}{' with refit' if quant.refit else ''} is no integer grid of at most 8 bits, and QuantizeLinear rounds to those"
    if isinstance(signal, Signal) and quant.grid.signed is None:
        return "it was never calibrated: nobody has decided whether its grid is signed"
    if isinstance(signal, Signal) and signal.offset is not None:
        return "a float offset has no place in QuantizeLinear; take a zero in codes, or none"
    if isinstance(quant.grain, PerChannel):
        if quant.grain.axis == 0:
            return "one step for each index of axis 0 is one for each sample of the batch; take PerTensor()"
        return None if clip(quant) is None else f"{quant.grid} takes a Clip, which has no step for each channel; take 8 bits, or PerTensor()"
    return None if quant.grain == PerTensor() else f"{quant.grain} has no place in QuantizeLinear; take PerTensor()"


def clip(quant: Quant) -> tuple[float, float] | None:
    """The ends of the grid where QuantizeLinear would not stop by itself; None where its 8 bits end where the grid ends.

    >>> clip(Quant(Uniform(4))), clip(Quant(Uniform(8)))
    ((-8.0, 7.0), None)
    """
    ends = (quant.grid.low, quant.grid.high)
    return None if ends in ((-128.0, 127.0), (0.0, 255.0)) and quant.clip is None else ends


def known(target: str) -> None:
    """Raises FormatError for a target that does not exist."""
    if target not in TARGETS:
        raise FormatError(unknown("target", f"onnx:{target}", [f"onnx:{name}" for name in TARGETS]))


def _zeros(tensor: Any) -> torch.Tensor | None:
    """The zeros that there are or may be, () without one; None where there is an offset."""
    place: Any = tensor
    if isinstance(tensor, Quant):
        place = tensor.scale.measure(torch.linspace(-1.0, 1.0, 32).reshape(1, 32), tensor.grid)
    if place.offset is not None:
        return None
    if place.zero is None:
        return torch.empty(0)
    return torch.tensor([tensor.grid.low, tensor.grid.high]) if isinstance(tensor, Quant) else place.zero
