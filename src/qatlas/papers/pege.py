"""PEGE: elements are rounded one after another, and rounded ones are drawn to their levels.

Kaiqi Zhao (Oakland University), "Progressive Element-wise Gradient Estimation for Neural Network Quantization", 2025, arXiv 2509.00097. No official
code is known. This file is a reconstruction: from the abstract, and from what looks like the method's predecessor in the same author's repository
kaiqi123/SQAKD (first commit of March 2024, deleted days later). What is inferred or chosen by us is an argument, and said here.

The straight-through gradient takes rounding for the identity and does not see the error x - Q(x). PEGE lets rounding in element by element, along a
logarithm that is fast first and slow later, and lets the gradient minimise the loss and the error together. It is a rule for backward, over any
forward quantizer; here LSQ's, with learned steps (`lsq`):

    forward   x~ = m R(x_n) + (1 - m) x_n       x_n: x clipped to the grid's range; R: rounding; m: 1 for a share p_t of the elements
    p_t       = min(1, log_B(k t + b)),         b = B^p_0,  k = (B - b) / T_r: from p_0 at the first step to 1 at step T_r
    backward  g M + m u_t (x - Q(x)),           M: the clip's own mask; u_t: one number a step
    u_t       = u_max growth^(t / T - 1)        from u_max / growth to u_max

The second term of the gradient is that of (u_t / 2) sum (x - Q(x))^2 with Q(x) held: a sum over elements, whatever the size of a layer. For an
element that is not rounded yet it is zero. Clipped elements are drawn, too, as in the predecessor's code. The step hears LSQ's gradient, of which the
part v - u comes from rounded elements alone. Eval mode and files always say Q(x).

From the abstract: replacing by a logarithmic curriculum, elementwise, weights and activations; the joint minimisation. From the predecessor's code:
the family of schedules, the sum, its growth over the whole run. Inferred, or ours:
- Only the rounding is masked (`scope` round); with `scope` clip an element that waits is x itself, unclipped.
- Who comes when (`order`): fixed draws once, and an element that is rounded stays so; fresh draws in each step, as BERT-of-Theseus does, the author's
  model for it. Weights follow `order` (fixed: less noise, in a trial of ours), activations are always drawn afresh.
- B = 10, p_0 = 0, and T_r at three quarters of the run, so that a quarter trains what will be stored.
- u in proportion: the predecessor's 1e-9 to 1e-6 fit its batch and losses only. `pull` is what the pull's root mean square is of the gradient's,
  tensor by tensor, at the end of the run; `relative=False` takes it for u_max itself.

Numbers of ours: docs/results.md#pege. On handwritten digits at 2 bits the error falls by a tenth, through the pull alone; accuracy does not move.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.error import RunError
from ..core.estimator import Clip, Snap
from ..core.grain import Grain, Group, PerChannel
from ..core.grid import Grid
from ..core.quantizer import Known, Quant, Quantizer, working
from ..core.scale import Learned
from ..model.coverage import describe
from ..model.roles import Role
from ..model.rules import Rule, keep_full, quantize
from ..train.fit import fit
from ..train.optim import AdamW
from ..train.schedule import cosine
from ..train.tactic import Loop, Tactic
from ..train.task import Task
from .lsq import mean, of_input, signed

CLAIM = "Better than straight-through and other gradient rules, by rounding elements one after another (CIFAR-10, ImageNet)."
Order = Literal["fixed", "fresh"]
Scope = Literal["round", "clip"]


@dataclass(frozen=True)
class Progressive(Quant):
    """A Quant whose rounding is let in element by element while training. order: "fixed" or "fresh"; scope: what waits, "round" or "clip" with it."""

    order: str = "fixed"
    scope: str = "round"

    def build(self) -> Mixing:
        return Mixing(self)

    @classmethod
    def of(cls, quant: Quant, order: str, scope: str) -> Progressive:
        """The same numbers, let in by and by."""
        if order not in ("fixed", "fresh") or scope not in ("round", "clip"):
            raise RunError(f"order={order!r}, scope={scope!r}: order is fixed or fresh, scope is round or clip")
        return cls(**{field.name: getattr(quant, field.name) for field in fields(Quant)}, order=order, scope=scope)


@dataclass(frozen=True)
class _Between(Grid):
    """A grid's range without its levels."""

    of: Grid

    @property
    def low(self) -> float:
        return self.of.low

    @property
    def high(self) -> float:
        return self.of.high

    @property
    def top(self) -> int:
        return self.of.top

    def snap(self, u: Tensor) -> Tensor:
        return u.clamp(self.low, self.high)

    def inside(self, u: Tensor, margin: float = 0.0) -> Tensor:
        return self.of.inside(u, margin)

    def passes(self, g: Tensor, u: Tensor, margin: float = 0.0) -> Tensor:
        return self.of.passes(g, u, margin)


class Mixing(Quantizer):
    """The module of `Progressive`. share: of the elements that are rounded in training mode; salt and step: what the draw depends on, so that a
    resumed run and a recomputed block draw the same; pull: u of activations, or what its root mean square is of the gradient's where `relative`."""

    quant: Progressive

    def __init__(self, quant: Quant) -> None:
        super().__init__(quant)
        self.share, self.salt, self.step, self.pull, self.relative = 1.0, 0, 0, 0.0, True
        self._ranks: tuple[Any, Tensor] | None = None

    def forward(self, x: Tensor, shift: Tensor | None = None, known: Known | None = None) -> Tensor:
        q = super().forward(x, shift, known)
        if not (self.training and self.on and self._seen is None) or (self.share >= 1 and not self.pull):
            return q
        mask = self.mask(x)
        y = q if mask is None else torch.where(mask, q, self.waiting(x, shift))
        return y if not self.pull else _Drawn.apply(y, x, q.detach(), mask, self.pull, self.relative)

    @torch.no_grad()
    def hard(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """All rounded, in training mode, too."""
        return super().forward(x, shift)

    def waiting(self, x: Tensor, shift: Tensor | None) -> Tensor:
        """What an element is until it is rounded: clipped, or itself."""
        if self.quant.scope == "clip":
            return x
        quant = self.quant.but(grid=_Between(self.quant.grid))
        view = quant.grain.view(working(x))
        strength = quant.scale.strength(view.shape, x.shape, quant.grid)
        y = Snap.apply(view, *self.place(view), None if shift is None else quant.grain.view(shift), None, quant, strength, None)
        return quant.grain.back(y, x.shape).to(x.dtype)

    @torch.no_grad()
    def mask(self, x: Tensor) -> Tensor | None:
        """Which elements are rounded in this step; None is all."""
        if self.share >= 1:
            self._ranks = None
            return None
        fixed = self.quant.order == "fixed"
        stamp = (tuple(x.shape), x.device, self.salt)
        if not fixed or self._ranks is None or self._ranks[0] != stamp:
            seed = self.salt if fixed else zlib.crc32(f"{self.salt}:{self.step}".encode())
            ranks = torch.rand(x.shape, generator=torch.Generator(x.device).manual_seed(seed), device=x.device)
            self._ranks = (stamp, ranks) if fixed else None
        else:
            ranks = self._ranks[1]
        return ranks < self.share


class _Drawn(torch.autograd.Function):
    """y, with the pull on x beside the gradient of y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, q: Tensor, mask: Tensor | None, pull: float, relative: bool) -> Tensor:  # type: ignore[override]
        ctx.pull, ctx.relative = pull, relative
        ctx.save_for_backward(x, q, mask)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, q, mask = ctx.saved_tensors
        return g, drawn(g, x, q, mask, ctx.pull, ctx.relative), None, None, None, None


def drawn(g: Tensor, x: Tensor, q: Tensor, mask: Tensor | None, pull: float, relative: bool) -> Tensor:
    """u m (x - q): u is `pull`, or what makes its root mean square that share of g's."""
    off = x - q if mask is None else (x - q) * mask
    if relative:
        size = off.norm()
        off = off * torch.where(size > 0, g.norm() / torch.where(size > 0, size, 1.0), 0.0)      # nothing is rounded yet, or all lie on levels
    return pull * off


class Curriculum(Tactic):
    """Let rounding in along a logarithm during the part `ramp` of the run, and draw what is rounded to its levels, ever more.

    >>> [round(Curriculum(1.0).share(step, 5), 2) for step in range(5)]
    [0.0, 0.51, 0.74, 0.89, 1.0]
    """

    def __init__(self, ramp: float = 0.75, pull: float = 0.0, growth: float = 1000.0, base: float = 10.0, start: float = 0.0,
                 relative: bool = True) -> None:
        if not (0 <= ramp <= 1 and 0 <= start <= 1 and base > 1 and pull >= 0 and growth >= 1):
            raise RunError(f"ramp={ramp:g}, start={start:g}, base={base:g}, pull={pull:g}, growth={growth:g}: ramp and start are parts, from 0 to 1; "
                           "base is above 1, pull 0 or more, growth 1 or more")
        self.ramp, self.pull, self.growth, self.base, self.first, self.relative = ramp, pull, growth, base, start, relative

    def share(self, step: int, steps: int) -> float:
        """p of a step: of the elements that are rounded. The last step always rounds all."""
        until = min(self.ramp * steps, steps - 1)
        if step >= until:
            return 1.0
        low = self.base**self.first
        return math.log((self.base - low) * step / until + low, self.base)

    def force(self, step: int, steps: int) -> float:
        """The pull of a step."""
        return self.pull * self.growth ** ((step + 1) / steps - 1)

    def mixing(self, loop: Loop) -> Iterator[tuple[str, Mixing]]:
        for name, module in loop.model.named_modules():
            if isinstance(module, Mixing):
                yield name, module

    def start(self, loop: Loop) -> None:
        for name, layer in loop.layers():
            if isinstance(layer.weight_quantizer, Mixing) and (layer.transform is not None or layer.adapter is not None):
                raise RunError(f"{name} has a transform or an adapter: what is drawn to its levels is the weight itself; leave it out")
        for name, module in self.mixing(loop):
            module.salt = zlib.crc32(f"{loop.task.run.seed}:{name}".encode())

    def before(self, loop: Loop) -> None:
        for name, module in self.mixing(loop):
            module.share, module.step = self.share(loop.step, loop.steps), loop.step
            weight = name.endswith("weight_quantizer")            # drawn in `grads`, once a step however many micro-batches there are
            module.pull, module.relative = 0.0 if weight else self.force(loop.step, loop.steps), self.relative

    @torch.no_grad()
    def grads(self, loop: Loop) -> None:
        if not self.pull:
            return
        for _, layer in loop.layers():
            quantizer, g = layer.weight_quantizer, layer.weight.grad
            if isinstance(quantizer, Mixing) and g is not None:
                w = layer.matrix()
                g += layer.unmatrix(drawn(g, w, quantizer.hard(w), quantizer.mask(w), self.force(loop.step, loop.steps), self.relative))


def pege(model: nn.Module, task: Task, *, bits: float = 4, input_bits: int | None = None, group: int | None = None, static: bool = False,
         order: Order = "fixed", scope: Scope = "round", ramp: float = 0.75, base: float = 10.0, start: float = 0.0, pull: float = 0.1,
         growth: float = 1000.0, relative: bool = True, lr: float = 3e-4, scale_lr: float = 0.01, weight_decay: float = 0.0, warmup: float = 0.05,
         steps: int = 400) -> nn.Module:
    """Fine-tune all weights and their steps under LSQ's numbers, rounding let in by a logarithmic curriculum.

    Args:
        bits: bits of the weights, 1.58 or 2 to 8.
        input_bits: bits of the layers' inputs, 2 to 8; None leaves them in full precision.
        group: inputs that share a weight's step; None is one step for each output channel.
        static: learn one step for each input tensor (encoders, vision) in place of a fresh one for each token.
        order: fixed: a weight that is rounded stays so; fresh: drawn in each step, as activations always are.
        scope: what an element waits for: round, or clip and round.
        ramp: share of the steps during which rounding is let in; 0 rounds all from the first step.
        base: of the logarithm; a larger one rises faster at first.
        start: share of the elements that are rounded in the first step.
        pull: the pull to the levels at the end of the run: its root mean square as a share of the gradient's; 0 pulls nothing.
        growth: how many times the pull grows over the run.
        relative: whether pull is that share, or u itself.
        lr: peak learning rate of the weights.
        scale_lr: peak learning rate of the steps, as a share of each step's own size.
        weight_decay: of matrices only.
        warmup: share of the steps that warm up; a cosine to zero follows.
        steps: optimizer steps.

    Returns:
        The model, its layers quantized and trained, in eval mode.

    Raises:
        QuantError: bits that LSQ does not speak of. RunError: a curriculum, an order or a scope that cannot be.
    """
    grain: Grain = PerChannel() if group is None else Group(group)
    weight = Quant(signed(bits), grain, Learned(mean(bits)), Clip())
    inputs = None if input_bits is None else Progressive.of(of_input(input_bits, static), "fresh", scope)
    curriculum = Curriculum(ramp, pull, growth, base, start, relative)
    ours = Rule("*", weight=Progressive.of(weight, order, scope), input=inputs)
    quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER), ours], task)
    describe(model, task.probe()).check()
    fit(model, task, optimizer=AdamW(lr=lr, weight_decay=weight_decay, scale_share=scale_lr), schedule=cosine(warmup), steps=steps,
        tactics=[curriculum])
    return model
