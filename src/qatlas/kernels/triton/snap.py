"""The nearest value of a grid, and which places a gradient passes, inside a kernel: what core/grid.py and core/estimator.py say, in registers.

Rounding is half to even and works by adding and subtracting 1.5 * 2^23, where fp32 numbers are whole: exact for places up to 2^22, and a place is cut
to the grid before. Nothing here may be fused: kernels that call it are launched with fuse=False.
"""

from __future__ import annotations

from ...core.estimator import Clip, Estimator, Ste, Trust
from ...core.grid import Grid, HalfStep, Sign, Ternary, Uniform
from .lang import jit, tl

KINDS = {Uniform: 0, HalfStep: 1, Ternary: 2, Sign: 3}
GATES = {Ste: 0, Clip: 1, Trust: 2}
GATE_OF = {"all": 0, "place": 1, "error": 2, "rounded": 3}


def why_not_snap(grid: Grid, estimator: Estimator) -> str:
    """Why the kernels of this folder cannot snap to this grid under this estimator; nothing where they can."""
    if type(grid) not in KINDS or getattr(grid, "signed", True) is None:
        return f"{grid}: kernels snap to Uniform, HalfStep, Ternary and Sign"
    if type(estimator) not in GATES:
        return f"{type(estimator).__name__}: kernels know Ste, Clip and Trust"
    return ""


def gate(grid: Grid, estimator: Estimator) -> tuple[int, float, float]:
    """How a gradient passes: which number is looked at (GATE_OF), and between which ends."""
    if isinstance(estimator, Trust):
        return 2, -estimator.bound, estimator.bound
    if isinstance(estimator, Clip):
        return (1, -estimator.at, estimator.at) if estimator.at is not None else within(grid, estimator.margin)
    return 0, 0.0, 0.0


def within(grid: Grid, margin: float) -> tuple[int, float, float]:
    """As `gate`, of grid.passes."""
    low, high = grid.reach
    return (3, low, high) if isinstance(grid, Uniform) and margin == 0.5 else (1, low - margin, high + margin)


@jit
def rounded(u, low, high):
    """u cut to low .. high (whole numbers), rounded half to even; NaN stays NaN, and zero is positive."""
    u = tl.where(u < low, low, tl.where(u > high, high, u))
    return (u + 12582912.0) - 12582912.0


@jit
def snap(u, low, high, threshold, KIND: tl.constexpr):
    """The nearest value of the grid."""
    if KIND == 0:
        return rounded(u, low, high)
    elif KIND == 1:
        return rounded(u - 0.5, low - 0.5, high - 0.5) + 0.5
    elif KIND == 2:
        return tl.where(u > threshold, 1.0, tl.where(u < -threshold, -1.0, tl.where(u == u, 0.0, u)))
    else:
        return tl.where(u >= 0, 1.0, tl.where(u < 0, -1.0, u))


@jit
def passes(u, v, low, high, GATE: tl.constexpr):
    """Whether the gradient passes; NaN lets it pass."""
    if GATE == 0:
        return (u == u) | (u != u)
    elif GATE == 1:
        return ~((u < low) | (u > high))
    elif GATE == 2:
        return ~(((u - v) < low) | ((u - v) > high))
    else:
        r = rounded(u, low - 1.0, high + 1.0)
        return ~((r < low) | (r > high))
