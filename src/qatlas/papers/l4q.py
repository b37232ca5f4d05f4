"""L4Q: parameter-efficient quantization-aware fine-tuning, LoRA and LSQ in one.

Hyesung Jeon, Yulhwa Kim, Jae-Joon Kim, ACL 2025, arXiv 2402.04902. No official code was found; formulas, start and rates are those of the paper's
text and appendix, the gradients derived again.

LoRA on a model that was quantized before it starts from damage and ends in two precisions. L4Q quantizes the sum of the frozen weight and the
adapter, so that the adapter learns through the quantizer and nothing is left to add at the end:

    w = w0 + (alpha / r) B A,     v = (w - b) / s,     w_hat = s round(clip(v, Qn, Qp)) + b,     y = w_hat x

With G = dL/dw_hat, formed once a layer and thrown away, and M = 1 where v lies inside:

    ds = sum G (round(v) - v inside; the end outside),     db = sum G (0 inside; 1 outside)
    dA = (alpha / r) B^T (G M),     dB = (alpha / r) (G M) A^T,     dx = w_hat^T dy

That is LSQ+ on groups, with the adapter behind it: with alpha = 0 it is LSQ on a frozen weight, bit for bit. w, v, w_hat and M are computed again
in the backward pass, so no layer keeps anything of its weight's size but w0 (layers/recomputed.py). Memory is LoRA's and that of the steps, which are
fp32 and have moments: 1.2 GB for 7 billion weights in groups of 128 with offsets, whose LoRA takes 20 (docs/performance.md). Steps start so that
nothing is cut (`Covering`),

    s = max(min w / Qn, max w / Qp),     b = 0

which has a larger error than other starts, and room for the adapter to move in: `start` names those that the paper compares.

Otherwise than the authors: weight decay leaves the steps alone, and the steps may have a rate of their own (`scale_lr`; the paper prints one rate for
all). w0 stays in the type in which the model was loaded (theirs: bfloat16) unless `store` says less. alpha is a symbol in the paper; 2 r here.
The paper prints its gradients without LSQ's factor, so it is off (`lsq_factor`). Few formats hold a float offset b (GGUF's Q4_1 and Q5_1; kernels of
GPTQ's kind do not): with a target that does not, b stays out unless `offset` asks for it, which is then refused by name. Those that do count codes
from the lowest: the same function with m = b + Qn s in the place of b.

Numbers of ours: docs/results.md#lowrank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.error import QuantError
from ..core.estimator import Clip
from ..core.grain import Group, PerChannel
from ..core.grid import Grid, Uniform
from ..core.place import Place
from ..core.quantizer import Quant
from ..core.scale import AbsMax, Learned, MinMax, Scale
from ..export.able import Numbers, refusal
from ..layers.adapter import Lora
from ..layers.frozen import Cast
from ..model.coverage import describe
from ..model.roles import Role
from ..model.rules import Rule, keep_full, quantize
from ..train.fit import fit
from ..train.optim import AdamW
from ..train.schedule import cosine
from ..train.task import Task

CLAIM = "Better than rounding and then adapting at 4 and 3 bits, with the memory of LoRA."
STARTS = ("covering", "deviation", "absmax", "minmax")
TRAINED = ("*.adapter.*", "*.weight_quantizer.*")


@dataclass(frozen=True)
class Covering(Scale):
    """The smallest step with which nothing is cut, on both sides of zero: max(min x / low, max x / high). L4Q's start.

    >>> Covering().measure(torch.tensor([[-8.0, 7.0], [-7.0, 7.0]]), Uniform(4)).s.flatten().tolist()
    [1.0, 1.0]
    """

    def measure(self, x: Tensor, grid: Grid) -> Place:
        sides = [end / reach for end, reach in ((x.amin(-1, keepdim=True), grid.low), (x.amax(-1, keepdim=True), grid.high)) if reach]
        return Place(torch.stack(sides).amax(0).clamp(min=0))


@dataclass(frozen=True)
class Deviation(Scale):
    """`times` standard deviations about the mean, on the larger side, land on the lower end: LSQ+'s start (arXiv 2004.09576)."""

    times: float = 3.0

    def measure(self, x: Tensor, grid: Grid) -> Place:
        off = self.times * x.std(-1, keepdim=True, correction=0)
        return Place((x.mean(-1, keepdim=True).abs() + off) / max(-grid.low, grid.high))


@dataclass(frozen=True)
class Shifted(Scale):
    """The step of another scale on the signed integers, with an offset that puts their zero on zero: 0, or the lowest code's value where codes are
    counted from it (unsigned grids).

    >>> Shifted().measure(torch.tensor([[-8.0, 7.0]]), Uniform(4, False)).offset
    tensor([[-8.]])
    """

    start: Scale = Covering()

    def measure(self, x: Tensor, grid: Grid) -> Place:
        signed = grid.but(signed=True) if isinstance(grid, Uniform) else grid
        s = self.start.measure(x, signed).s
        return Place(s, offset=s * (signed.low - grid.low))


def l4q(model: nn.Module, task: Task, *, bits: int = 4, group: int | None = 128, rank: int = 4, alpha: float = 8.0, start: str = "covering",
        offset: bool | None = None, lsq_factor: bool = False, store: str | None = None, lr: float = 2e-4, scale_lr: float | None = None,
        weight_decay: float = 0.01, warmup: float = 0.1, steps: int = 400) -> nn.Module:
    """Train an adapter inside the quantizer of each linear layer, and the quantizers' steps; the weights stay frozen.

    Args:
        bits: bits of the weights, 2 to 8.
        group: inputs that share a step; None is one step for each output channel.
        rank: of the adapters; the paper's is 4.
        alpha: the adapter is multiplied with alpha / rank; 0 is LSQ on frozen weights.
        start: of the steps: covering (the paper's), or what it compares: deviation (LSQ+'s), absmax, minmax (with an offset).
        offset: learn an offset of each group too; None does unless there is a target that holds none.
        lsq_factor: multiply the gradients of steps and offsets with LSQ's 1 / sqrt(N Qp).
        store: the type of the frozen weights, float32, bfloat16 or float16; None keeps that of the loaded model.
        lr: peak learning rate.
        scale_lr: that of steps and offsets, as a share of each step's own size; None takes lr itself, as the paper.
        weight_decay: of the adapters.
        warmup: share of the steps that warm up; a cosine to zero follows.
        steps: optimizer steps.

    Returns:
        The model with its adapters, in eval mode. Packing merges them into the codes.

    Raises:
        QuantError: bits or a start that L4Q does not speak of.
    """
    quant = of_weight(bits, group, start, offset, lsq_factor, task.target)
    rule = Rule("*", weight=quant, adapter=Lora(rank, alpha), frozen=Cast(store), keep="recompute")
    quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER), rule], task)
    describe(model, task.probe()).check()
    fit(model, task, train=TRAINED, optimizer=AdamW(lr=lr, weight_decay=weight_decay, scale_share=scale_lr), schedule=cosine(warmup), steps=steps)
    return model


def of_weight(bits: int, group: int | None, start: str, offset: bool | None, lsq_factor: bool, target: str | None) -> Quant:
    """The Quant of a weight."""
    if bits not in range(2, 9):
        raise QuantError(f"L4Q takes weights of 2 to 8 whole bits, not bits={bits:g}")
    if start not in STARTS:
        raise QuantError(f"there is no start {start!r} of L4Q; there are {', '.join(STARTS)}")
    if start == "minmax" and offset is False:
        raise QuantError("start='minmax' is a range with an offset; leave out offset=False, or take another start")
    plain: dict[str, Scale] = {"covering": Covering(), "deviation": Deviation(), "absmax": AbsMax(reach=2 ** (bits - 1))}
    first = MinMax("offset") if start == "minmax" else Shifted(plain[start])
    grain = PerChannel() if group is None else Group(group)

    def quant(first: Scale, signed: bool = True) -> Quant:
        return Quant(Uniform(bits, signed), grain, Learned(first, factor="lsq" if lsq_factor else 1.0), Clip())

    if offset is False:
        return quant(plain[start])
    if target is None:
        return quant(first)
    held = [q for signed in (True, False) if _holds(q := quant(first, signed), group, target)]
    return held[0] if held else quant(first if offset or start == "minmax" else plain[start])


def _holds(quant: Quant, group: int | None, target: str) -> bool:
    return refusal(Numbers(quant, shape=(8, group or 256)), target) is None
