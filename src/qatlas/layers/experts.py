"""Experts: the stacked matrices of a mixture, each expert with numbers of its own.

transformers holds all experts of a layer in two parameters, gate_up_proj (E, 2 I, H) and down_proj (E, H, I), of one module whose forward picks them
apart: nothing that a rule could replace. `Experts` computes the same from two `Stack`s, which are layers with a weight:

    rows      the tokens of expert 0, then those of expert 1, ...: each token once for every expert that it is sent to
    hidden    act(gate) * up, from gate_up_proj(rows)
    output    for each token the sum of its experts' down_proj(hidden), each times its routing weight

A Stack's weight is the matrix (E out, in), one expert below the other. So one scale a row, or a group, belongs to one expert by itself; one scale "a
tensor" becomes one for each expert (Block(out, in)). What would run over experts is refused: blocks of more rows than an expert has, one scale a
column, adapters. Inputs are quantized where they enter each product, as in any linear layer.

`why_not` says which modules can be opened so: the two parameters and no other, no forward of their own, and a trial on random tokens that gives what
the module itself gives. Biases, transposed or interleaved matrices (GPT-OSS), clamped gates are refused, with the reason, and stay as they are.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.error import QuantError
from ..core.grain import Block, PerChannel, PerTensor, Scattered
from ..core.quantizer import Quant
from .packed import Packed
from .quantized import Quantized

STACKS = ("gate_up_proj", "down_proj")
TAKES = ["self", "hidden_states", "top_k_index", "top_k_weights"]
NEAR = {torch.float16: 1e-2, torch.bfloat16: 5e-2}                # how far from the module's own forward is still the same, relative; else 1e-4
TRIAL = 16                                                        # tokens of the trial


class Stack(nn.Module):
    """One matrix for each expert, (experts out, in)."""

    weight: Any

    def __init__(self, weight: Tensor, experts: int) -> None:
        super().__init__()
        self.weight, self.experts = nn.Parameter(weight, requires_grad=weight.requires_grad), experts

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        """x (rows, in), sorted by expert, `sizes` rows for each -> (rows, out)."""
        return _products(x, self.weight, self.experts, sizes)

    def extra_repr(self) -> str:
        return f"{self.experts} x {(self.weight.shape[0] // self.experts, self.weight.shape[1])}"


def _products(x: Tensor, w: Tensor, experts: int, sizes: list[int]) -> Tensor:
    each = w.to(x.dtype).unflatten(0, (experts, -1))
    parts = [F.linear(part, each[i]) for i, part in enumerate(x.split(sizes)) if part.shape[0]]
    return torch.cat(parts) if parts else x.new_zeros(0, each.shape[1])


class QStack(Quantized, Stack):
    """A Stack with quantized numbers."""

    replaces = Stack
    bias = None
    _sizes: list[int]

    def _set(self, slots, peak) -> None:  # type: ignore[no-untyped-def]
        rows, width = self.weight.shape[0] // self.experts, self.weight.shape[1]
        if slots.adapter is not None:
            raise QuantError("an adapter would be shared by all experts of a stack: adapters act on linear layers")
        if isinstance(slots.weight, Quant):
            grain = slots.weight.grain
            across = (isinstance(grain, PerChannel) and grain.axis != 0) or (isinstance(grain, Block) and rows % grain.rows) \
                or (isinstance(grain, Scattered) and grain.order)
            if across:
                raise QuantError(f"{grain} has scales that run over several experts of {rows} x {width}; take PerChannel(), Group(n), PerTensor()")
            slots = slots.but(weight=slots.weight.but(grain=Block(rows, width))) if isinstance(grain, PerTensor) else slots
        super()._set(slots, peak)

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:  # type: ignore[override]
        self._sizes = sizes
        return super().forward(x)

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return _products(x, w, self.experts, self._sizes)

    def pack(self) -> PackedStack:
        return PackedStack.of(self.quantize(), None, self)


class PackedStack(Packed):
    """As Stack, from packed codes."""

    conf = ("experts",)
    experts: int
    _sizes: list[int]

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:  # type: ignore[override]
        self._sizes = sizes
        if self.kernel is None or self.transform is not None or not self.kernel.serves(x):
            return super().forward(x)
        y = self.kernel(x, None, sizes)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return _products(x, w, self.experts, self._sizes)

    def multiply(self, q: Tensor) -> Tensor:
        rows = self.store.shape[0] // self.experts
        each = torch.is_grad_enabled() or torch.compiler.is_compiling() or self.store.rows(slice(0, rows)) is None
        if each:
            return super().multiply(q)
        parts = [F.linear(part, self.store.rows(slice(i * rows, (i + 1) * rows)).dequantize().to(q.dtype))      # experts with tokens, no others
                 for i, part in enumerate(q.split(self._sizes)) if part.shape[0]]
        return torch.cat(parts) if parts else q.new_zeros(0, rows)


class Experts(nn.Module):
    """What transformers' stacked experts compute, from two Stacks."""

    gate_up_proj: Any
    down_proj: Any

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.num_experts, self.act_fn = module.gate_up_proj.shape[0], module.act_fn
        for name in STACKS:
            weight = getattr(module, name)
            setattr(self, name, Stack(weight.detach().flatten(0, 1).requires_grad_(weight.requires_grad), self.num_experts))
        self.train(module.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, H), (tokens, k), (tokens, k) -> (tokens, H). An index beyond the last expert means none."""
        at = top_k_index.T.flatten()                              # (k tokens): first choices first, as the module's own loop adds them up
        sizes = at.bincount(minlength=self.num_experts)[: self.num_experts].tolist()
        order = at.argsort(stable=True)[: sum(sizes)]
        token = order % max(hidden_states.shape[0], 1)
        gate, up = self.gate_up_proj(hidden_states[token], sizes).chunk(2, -1)
        out = self.down_proj(self.act_fn(gate) * up, sizes) * top_k_weights.T.flatten()[order, None]
        return torch.zeros_like(hidden_states).index_add_(0, token, out.to(hidden_states.dtype))


def stacked(module: nn.Module) -> bool:
    """Whether a module holds experts as stacked parameters."""
    return all((p := module._parameters.get(name)) is not None and p.dim() == 3 for name in STACKS)


@torch.no_grad()
def why_not(module: Any) -> str | None:
    """Why stacked experts cannot be opened; None where they can. On the meta device nothing is tried."""
    kind = type(module).__name__
    more = sorted({name.rpartition(".")[0] or name for name, _ in module.named_parameters()} - set(STACKS))
    up, down = module.gate_up_proj, module.down_proj
    if more:
        return f"{kind} holds more than two stacks of matrices ({', '.join(more[:3])})"
    if (up.shape[0], up.shape[1], up.shape[2]) != (down.shape[0], 2 * down.shape[2], down.shape[1]):
        return f"{kind} has stacks of {tuple(up.shape)} and {tuple(down.shape)}, not (E, 2 I, H) and (E, H, I)"
    if "forward" in module.__dict__ or not callable(getattr(module, "act_fn", None)) \
            or list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[:4] != TAKES:
        return f"{kind} has a forward of another form than (hidden_states, top_k_index, top_k_weights), or no act_fn"
    if up.is_meta:
        return None
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(TRIAL, up.shape[2], generator=draw).to(up.device, up.dtype)
    index = torch.rand(TRIAL, up.shape[0], generator=draw).argsort(-1)[:, :2].to(up.device)
    weights = torch.rand(index.shape, generator=draw).to(up.device, up.dtype)
    own, ours = module(x, index, weights), Experts(module)(x, index, weights)
    apart = float((own - ours).abs().max() / own.abs().max().clamp(min=1e-6))
    return None if apart <= NEAR.get(up.dtype, 1e-4) else f"{kind} computes more than act(gate) up from its stacks (it differs by {apart:.1g})"
