"""A weight made ready for the kernels: the packed codes as they are, and one affine map from code to value.

Every grid of equal steps is v = mul (c + low) for its code c, low a whole or a half number. So a weight is

    w = S (c - Z)        S = s mul,    Z = z / mul - low        one S (and one Z, where zeros differ) for a row or for a group of inputs

with Z one number for the whole matrix where there are no zeros. An offset in values joins Z: s v + m = s (v + m / s), to the rounding of fp32. Grids of
free levels (Codebook, Float) keep a table of their values in place of low. Codes are `pack_bits`'s bytes, used in place: only a row of a number of
bytes that no machine word divides is copied, to be padded. S and Z are kept in fp16 or bf16 where that is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.error import QuantError
from ...core.grain import Block, Grain, Group, PerChannel, PerTensor, Scattered
from ...core.grid import Grid, HalfStep, Sign, Stretched, Ternary, Uniform
from ...core.qtensor import QTensor, pack_bits
from .lang import why_not_here

UNIT = {1: 8, 2: 8, 3: 8, 4: 8, 5: 8, 6: 8, 7: 8, 8: 4}           # codes that a kernel unpacks from one word
WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}        # of those bits; of others a word is so many single bytes


@dataclass(frozen=True)
class Matrix:
    """(rows, width) as codes and S, Z. codes: (rows, bytes) uint8; scale, zero: (rows, groups) or (rows, 1); group: inputs that share one S, the
    width where a row has one. shift: Z where `zero` is None. table: the values of codes, S alone applies then (and `zero` not)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None
    shift: float
    rows: int
    width: int
    bits: int
    group: int
    halves: int = 0                                               # c - Z are whole numbers: 1; whole or half ones: 2; neither: 0
    e4m3: bool = False                                            # the codes are fp8 numbers

    @property
    def grouped(self) -> bool:
        """Whether a row has several steps."""
        return self.group < self.width

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads of it."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.zero) if t is not None)


def why_not(grid: Grid, grain: Grain, shape: tuple[int, ...], device: torch.device | None = None) -> str:
    """Why no kernel takes such a weight; nothing where one does. The device is asked as well, where it is given."""
    if device is not None and (reason := why_not_here(device)):
        return reason
    if len(shape) != 2:
        return f"a weight of {len(shape)} dimensions; kernels take (outputs, inputs)"
    if not 1 <= int(grid.bits) <= 8:
        return f"{grid.bits}-bit codes; kernels take 1 to 8 bits"
    if isinstance(grid, Uniform) and grid.signed is None:
        return "a grid whose sign calibration has not settled"
    if isinstance(grain, Scattered):
        return "scattered groups (GPTQ's desc_act): permute the inputs first, then it is Group"
    if isinstance(grain, Block) or (isinstance(grain, PerChannel) and grain.axis not in (0, -2)) or \
            not isinstance(grain, PerTensor | PerChannel | Group):
        return f"{grain}: kernels take PerTensor(), PerChannel() and Group(n)"
    if isinstance(grain, Group) and grain.size < shape[1] and grain.size % 16:
        return f"groups of {grain.size}: kernels take groups that 16 divides"
    if isinstance(grain, Group) and (grain.size < 1 or shape[1] % grain.size):
        return f"a group of {grain.size} does not divide {shape[1]} inputs"
    return ""


def prepare(weight: QTensor, packed: Tensor | None = None) -> Matrix:
    """The weight for the kernels. `packed`: its codes as `pack_bits` gives them, where they are at hand already; they are used in place.

    Raises:
        QuantError: a weight that no kernel takes (`why_not`).
    """
    shape = tuple(weight.shape)
    if reason := why_not(weight.grid, weight.grain, shape):
        raise QuantError(f"no Triton kernel for {weight.grid}: {reason}")
    rows, width, bits = *shape, weight.bits
    packed = pack_bits(weight.codes, bits) if packed is None else packed
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (rows, -(-width * bits // 8)):
        raise QuantError(f"packed codes of {packed.dtype} {tuple(packed.shape)} are not those of a {bits}-bit weight of shape {shape}")
    group = weight.grain.size if isinstance(weight.grain, Group) else max(width, 1)
    mul, low, table = affine(weight.grid, packed.device)
    groups = max(width // group, 1)
    steps = weight.steps.float().reshape(-1, groups).expand(rows, groups) if width and rows else weight.steps.new_zeros(rows, groups)
    scale, zero = steps * mul, weight.zero
    if weight.offsets is not None:
        m = weight.offsets.float().reshape(-1, groups).expand(rows, groups)
        scale = torch.where((scale == 0) & (m != 0), m.abs() * 2.0**-40, scale)        # a constant group: any step far below its value
        zero = torch.where(scale == 0, 0.0, -m / scale) * mul
    elif zero is not None:
        zero = zero.float().reshape(-1, groups).expand(rows, groups)
    if zero is not None and table is not None:
        raise QuantError(f"no Triton kernel for {weight.grid} with a zero or an offset: a table of levels has steps alone")
    z = None if zero is None else narrow(zero / mul - low)
    e4m3 = bits == 8 and (getattr(weight.grid, "exponent", 0), getattr(weight.grid, "mantissa", 0)) == (4, 3)
    return Matrix(aligned(packed, bits), narrow(scale), z, table, -low, rows, width, bits, group, 0 if table is not None else halves(z, -low), e4m3)


def halves(zero: Tensor | None, shift: float) -> int:
    """1 where all Z are whole numbers, 2 where they are whole or half ones (and an int8 product can be exact), else 0."""
    z = torch.tensor(shift) if zero is None else zero.float()
    return next((a for a in (1, 2) if bool(((a * z).round() == a * z).all()) and bool((z.abs() <= 512).all())), 0)


def affine(grid: Grid, device: torch.device) -> tuple[float, float, Tensor | None]:
    """mul and low of v = mul (c + low); or 1, 0 and the table of values.

    >>> affine(Sign(), torch.device("cpu"))
    (2.0, -0.5, None)
    """
    if isinstance(grid, Uniform):
        return 1.0, grid.low - grid.narrow, None
    if isinstance(grid, HalfStep | Ternary):
        return 1.0, grid.low, None
    if isinstance(grid, Sign):
        return 2.0, -0.5, None
    if isinstance(grid, Stretched):
        return 2 / grid.levels, -(grid.levels - 1) / 2, None
    codes = torch.arange(2 ** int(grid.bits), device=device)
    return 1.0, 0.0, grid.decode(codes.clamp(max=grid.count - 1) if hasattr(grid, "table") else codes).float()


def narrow(values: Tensor) -> Tensor:
    """The same numbers in the narrowest type of two and four bytes that holds each, contiguous."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(values.to(dtype).float(), values):
            return values.to(dtype).contiguous()
    return values.contiguous()


def aligned(packed: Tensor, bits: int) -> Tensor:
    """The bytes with rows that begin where a word may; themselves where they do already."""
    size = WORD[bits].itemsize if bits in WORD else bits
    packed = packed.contiguous()
    if packed.shape[1] % size or packed.data_ptr() % (size if bits in WORD else 1):
        return torch.nn.functional.pad(packed, (0, -packed.shape[1] % size)).clone()
    return packed
