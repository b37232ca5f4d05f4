"""A weight made ready for the kernels: the packed codes as they are, and one affine map from code to value.

Every grid of equal steps is v = mul (c + low) for its code c, low a whole or a half number. So a weight is

    w = S (c - Z)        S = s mul,    Z = z / mul - low        one S (and one Z, where zeros differ) for a row or for a group of inputs

with Z one number for the whole matrix where there are no zeros. An offset in values joins Z: s v + m = s (v + m / s), to the rounding of fp32. Grids
of free levels (Codebook, Float) keep a table of their values in place of low. Codes are `pack_bits`'s bytes, used in place: only a row of a number of
bytes that no machine word divides is copied, to be padded. S and Z are kept in fp16 or bf16 where that is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core.error import QuantError
from ...core.grain import Grain, Group, PerChannel, PerTensor
from ...core.grid import Grid, HalfStep, Sign, Stretched, Ternary, Uniform
from ...core.qtensor import QTensor, pack_bits, unpack_bits
from .lang import why_not_here

UNIT = {1: 8, 2: 8, 3: 8, 4: 8, 5: 8, 6: 8, 7: 8, 8: 4}           # codes that a kernel unpacks from one word
WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}        # of those bits; of others a word is so many single bytes


@dataclass(frozen=True, eq=False)
class Packed:
    """What a kernel is given. codes (rows, bytes) uint8, a row padded to whole words; scale, zero, offset (rows, groups) or (rows, 1).

    Products with floats take w = scale (c - zero), `shift` in place of a zero that is None, or scale table[c]; products with integers take
    s (v - z) or s v + m as stored, with v = (a c + w) part and `whole` = (a, w, part).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None
    table: Tensor | None
    shift: float
    rows: int
    width: int
    bits: int
    group: int
    whole: tuple[int, int, float] | None = None

    @property
    def grouped(self) -> bool:
        """Whether a row has several steps."""
        return self.group < self.width

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads of it."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.zero, self.offset) if t is not None)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A packed weight (rows, width), as floats multiply it and as integers do; both have the same codes."""

    floats: Packed
    integers: Packed = field(repr=False)
    grid: Grid
    grain: Grain
    shape: tuple[int, int]

    @classmethod
    def of(cls, q: QTensor) -> Matrix:
        """From a QTensor; its codes are packed, which copies them."""
        return cls.from_parts(pack_bits(q.codes, q.bits), q.steps, q.zero, q.offsets, q.grid, q.grain, tuple(q.shape))

    @classmethod
    def from_parts(cls, codes: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, grid: Grid, grain: Grain,
                   shape: tuple[int, ...]) -> Matrix:
        """From the buffers of a packed layer; codes whose rows begin where a machine word may stay where they are.

        Raises:
            QuantError: what no kernel covers (`why_not`), or tensors that do not belong together.
        """
        if reason := why_not(grid, grain, shape):
            raise QuantError(f"no kernel multiplies with this packed weight: {reason}")
        rows, width = shape
        bits, wanted = int(grid.bits), grain.scale_shape(tuple(shape))
        if codes.dtype != torch.uint8 or tuple(codes.shape) != (rows, -(-width * bits // 8)):
            raise QuantError(f"packed codes of a {tuple(shape)} weight of {bits} bits are uint8 ({rows}, {-(-width * bits // 8)}), "
                             f"not {codes.dtype} {tuple(codes.shape)}")
        for name, t in (("scale", scale), ("zero", zero), ("offset", offset)):
            if t is not None and tuple(t.shape) != wanted:
                raise QuantError(f"the {name} of a {tuple(shape)} weight with {grain} has shape {wanted}, not {tuple(t.shape)}")
        mul, low, table = affine(grid, codes.device)
        if table is not None and (zero is not None or offset is not None):
            raise QuantError(f"no kernel multiplies with this packed weight: {grid} with a zero or an offset (a table of levels has steps alone)")
        groups = width // grain.size if isinstance(grain, Group) else 1
        s, z, m = (None if t is None else t.detach().to(codes.device, torch.float32).reshape(-1, groups).expand(rows, groups)
                   for t in (scale, zero, offset))
        assert s is not None
        step, shifts = s * mul, None if z is None else narrow(z / mul - low)
        if m is not None:
            step = torch.where((step == 0) & (m != 0), m.abs() * 2.0**-40, step)       # a constant group: any step far below its value
            shifts = narrow(torch.where(step == 0, 0.0, -m / step) - low)
        codes, group = aligned(codes, bits), grain.size if isinstance(grain, Group) else max(width, 1)
        floats = Packed(codes, narrow(step), shifts, None, table, -low, rows, width, bits, group)
        z, m = None if z is None else narrow(z), None if m is None else narrow(m)
        return cls(floats, Packed(codes, narrow(s), z, m, None, 0.0, rows, width, bits, group, whole(grid)), grid, grain, (rows, width))

    @property
    def codes(self) -> Tensor:
        """The packed codes."""
        return self.floats.codes

    def dequantize(self) -> Tensor:
        """The weight, fp32 (rows, width)."""
        part, wanted = self.integers, self.grain.scale_shape(self.shape)
        codes = unpack_bits(part.codes[:, : -(-part.width * part.bits // 8)], part.bits, self.shape)
        s, z, m = (None if t is None else t.float()[: 1 if wanted == (1,) else None].reshape(wanted) for t in (part.scale, part.zero, part.offset))
        assert s is not None
        return QTensor(codes, s, z, m, self.grid, self.grain).dequantize()

    def nbytes(self) -> int:
        """Bytes that one product with floats reads of it."""
        return self.floats.nbytes


def why_not(grid: Grid, grain: Grain, shape: tuple[int, ...], integers: bool = False, device: torch.device | None = None) -> str:
    """Why no kernel multiplies with a weight of this kind ("" if one does); integers: by `linear_int8`; device: there."""
    if device is not None and (reason := why_not_here(device)):
        return reason
    if len(shape) != 2:
        return f"it has {len(shape)} axes, and a matrix has two"
    if not 1 <= int(grid.bits) <= 8 or (isinstance(grid, Uniform) and grid.signed is None):
        return f"{grid}; the kernels know codes of 1 to 8 bits, signed or not"
    if not isinstance(grain, PerTensor | PerChannel | Group) or (isinstance(grain, PerChannel) and grain.axis not in (0, -2)):
        return f"its scales serve {grain}; the kernels know PerTensor(), PerChannel() and Group(n)"
    if isinstance(grain, Group) and (grain.size < 1 or shape[1] % grain.size):
        return f"a group of {grain.size} does not divide {shape[1]} inputs"
    group = grain.size if isinstance(grain, Group) else shape[1]
    unit = 32 if integers else 16
    if group != shape[1] and group % unit:
        return f"groups of {group}; the tensor cores take {unit} inputs at a time, and multiples of {unit} fit"
    if not integers:
        return ""
    if (numbers := whole(grid)) is None:
        return f"the values of {grid} are no whole numbers of a part of a step, which products of whole numbers need"
    a, w, _ = numbers
    most = max(abs(w), abs(a * (2 ** int(grid.bits) - 1) + w)) * 128 * group
    return f"the sums of {group} products may pass 2^31" if most >= 2**31 else ""


def whole(grid: Grid) -> tuple[int, int, float] | None:
    """(a, w, part) of v = (a c + w) part in whole numbers, part a power of two and a 1 or 2; or None.

    >>> from qatlas.core.grid import HalfStep
    >>> whole(HalfStep(2)), whole(Sign())
    ((2, -3, 0.5), (2, -1, 1.0))
    """
    codes = torch.arange(min(2 ** int(grid.bits), grid.count))
    v = grid.decode(codes)
    unit, low = float(v[1] - v[0]), float(v[0])
    for parts in (1, 2, 4, 8, 16, 32, 64, 128, 256) if torch.equal(v, codes * unit + low) else ():
        if unit * parts in (1.0, 2.0) and (low * parts).is_integer():
            return int(unit * parts), int(low * parts), 1 / parts
    return None


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
