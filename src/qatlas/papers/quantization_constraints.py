"""Quantization constraints: the full-precision network learns the task, under the condition that its low-bit self stays close (PD-QAT).

Ignacio Hounie, Juan Elenter, Alejandro Ribeiro, "Neural Networks with Quantization Constraints", ICASSP 2023, arXiv 2210.15623. Official code:
ihounie/pd-qat, where algorithm, quantizer and defaults were checked; theory and table are from memory.

One set of latent weights, two networks: f in full precision and f^q, the same weights quantized. Training is a constrained problem,

    min E[loss(f)]    such that    E[D(f^q, f)] <= eps_out    and    E[d_l] <= eps_layer    for each layer l

D compares the outputs; d_l = mean (z_l - z_l^q)^2 compares layer l in both precisions on *the same* input, the one that it gets in f^q. So each
constraint measures its own layer's error, and not what came from below. It is solved by primal descent and dual ascent on the Lagrangian:

    every step          descend  loss(f) + sum_l lambda_l (d_l - eps_layer) + lambda_out (D - eps_out)
    every so many       lambda <- max(0, lambda + rate * slack),  slack the mean of (constraint - eps) over some batches in eval mode
                        lambda starts at 0 for layers, 1 for the output

No straight-through estimator is needed: f^q is a constant for the shared weights, which hear the constraints through f and z_l alone. What belongs to
f^q alone learns from D: its batch norms (each precision has its own, statistics and affine; `Twin`) and its steps. `both` lets the shared weights
hear D through f^q, too, by the straight-through gradient. A layer's final lambda says how much the loss would gain if its constraint were looser:
layers with the largest should get more bits. It is left on the model as `qatlas_duals`.

    base "dorefa"   the authors': every weight is seen as w' = mean|w| tanh(w) / max|tanh w|, in full precision, too; in b bits 2^b even levels from
                    -max|w'| to max|w'| (`Bounded`; merged at the end). It shrinks a trained weight by about mean|w| / max|w|: for training from
                    scratch, or where a batch norm follows that learns anew
    base "lsq"      the weight itself, and a learned step a channel: the default, since models here have learned something before

`constrained=False` is the control: the same quantizers trained by the task's loss through the straight-through gradient.

Otherwise than the authors:
- D is the Kullback-Leibler divergence; theirs, the cross entropy (`cross`), has the entropy of f in it, so in a language model no eps could be met.
- d_l is divided by the mean square of the layer's output (`relative`): their activations are cut to [0, 1], where eps means the same everywhere.
- Both sides of d_l are the bare product. In their code the first convolution of a block holds its bare output, cut to [0, 1], against the *next*
  layer's input behind norm and activation; and the cut is on one side. That is not here.
- Inputs have a learned step a tensor (static), or a fresh one a token, in place of steps of 1 / (2^b - 1) on [0, 1].
- `duals` updates a run, from a few batches of the last steps; theirs are one an epoch over the whole training set, at a rate of 0.01.
- One low precision. Theirs may have several at once. The slack of the output moves its own lambda only; theirs without layers moves all.

Numbers of ours: docs/results.md#quantization-constraints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.error import QuantError, RunError
from ..core.estimator import Clip, Ste
from ..core.grain import PerChannel, PerTensor
from ..core.grid import HalfStep
from ..core.quantizer import Quant, Quantizer
from ..core.scale import AbsMax, AbsMean, Learned
from ..layers.adapter import Adapter, AdapterSpec
from ..layers.quantized import Quantized
from ..model.coverage import describe
from ..model.quantized import quantized
from ..model.roles import Role
from ..model.rules import UNSET, Rule, keep_full, quantize
from ..model.taps import read
from ..model.twins import Twin, pair, part
from ..train import loss as losses
from ..train.evaluate import judged
from ..train.fit import fit
from ..train.imitate import bare
from ..train.optim import AdamW
from ..train.schedule import cosine
from ..train.tactic import Loop, Tactic
from ..train.task import Batch, Task, device, moved
from ..train.teacher import Once, full_precision
from .lsq import of_input, signed

CLAIM = "One set of weights serves in high and in low precision; the final duals say which layer needs more bits."


@dataclass(frozen=True)
class Bounded(AdapterSpec):
    """DoReFa's view of a weight (arXiv 1606.06160): w' = E tanh(w) / max|tanh w|, E = mean|w| held. It has no parameters and merges exactly."""

    def build(self, weight: Tensor) -> Adapter:
        return _Bounded()


class _Bounded(Adapter):
    def inside(self, w: Tensor) -> Tensor:
        t = w.tanh()
        return w.detach().abs().mean() * (t / t.abs().amax().clamp(min=torch.finfo(w.dtype).tiny))

    def merged(self, w: Tensor, layer: Quantized) -> Tensor:
        return self.inside(w)


@contextlib.contextmanager
def high(model: nn.Module) -> Iterator[None]:
    """The full-precision network inside: quantizers off, its own batch norms."""
    twins = [module for module in model.modules() if isinstance(module, Twin)]
    with full_precision(model):
        for twin in twins:
            twin.at = "high"
        try:
            yield
        finally:
            for twin in twins:
                twin.at = "low"


@contextlib.contextmanager
def deaf(model: nn.Module) -> Iterator[None]:
    """Inside, only what belongs to the low-bit network alone is part of a graph: its norms and its steps."""
    own = {id(p) for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}
    own |= {id(p) for module in model.modules() if isinstance(module, Twin) for p in module.low.parameters()}
    shared = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    for p in shared:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in shared:
            p.requires_grad_(True)


class Lagrangian:
    """A loss for `fit`: the task's in full precision and lambda times slack of each constraint; the last one is the output's."""

    def __init__(self, task: Task, model: nn.Module, *, eps_out: float = 0.1, eps_layer: float = 1 / 255, layerwise: bool = True,
                 relative: bool = True, cross: bool = False, both: bool = False) -> None:
        self.task, self.relative, self.cross, self.both = task, relative, cross, both
        self.sites = [name for name, layer in quantized(model).items() if layerwise and layer.weight_quantizer is not None and _multiplies(layer)]
        self.eps = torch.tensor([eps_layer] * len(self.sites) + [eps_out])
        self.duals = torch.tensor([0.0] * len(self.sites) + [1.0])

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        with high(bare(model)):
            kept = Once(self.task.logits(model, batch))
        slacks = self.slacks(model, batch, kept.logits)
        return self.task.loss(kept, batch) + (self.duals.to(slacks.device) * slacks).sum()

    def slacks(self, model: nn.Module, batch: Batch, logits: Tensor) -> Tensor:
        """Each constraint less its eps. logits: of the full-precision network."""
        inner = bare(model)
        taps = [f"{name}:{at}" for name in self.sites for at in ("input", "output")]
        with contextlib.nullcontext() if self.both else deaf(inner), read(inner, taps) as found:
            low = self.task.logits(model, batch)
            seen = {address: x.detach() for address, x in found.items()}
        terms = [apart(inner.get_submodule(name), seen[f"{name}:input"], seen[f"{name}:output"] if self.relative else None) for name in self.sites]
        mask = losses.predicted(batch["labels"]) if low.dim() == 3 and "labels" in batch else None
        out = losses.soft_cross_entropy(low, logits, mask) if self.cross else self.task.divergence(low, logits, mask=mask)
        return torch.stack([*terms, out]) - self.eps.to(out.device)


def apart(layer: Any, x: Tensor, y: Tensor | None) -> Tensor:
    """d of one layer on its input x: the mean square of what full precision adds to the low-bit product, by that of y where it is given. The low-bit
    weight and the input are constants."""
    with torch.no_grad():
        x = x if layer.norm is None else layer.norm(x)
        x = x if layer.transform is None else layer.transform.of_input(x)
        q = x if layer.input_quantizer is None else layer.input_quantizer(x)
        low = layer.computed()
    z = layer.product(q, (layer.source() - low).to(q.dtype))
    if layer.bias is not None:
        z = z - layer.bias.reshape(-1, *[1] * (layer.matrix().dim() - 2))                     # (out), (out, 1, 1)
    d = z.float().square().mean()
    return d if y is None else d / y.float().square().mean().clamp(min=torch.finfo(torch.float32).tiny)


def _multiplies(layer: Quantized) -> bool:
    """Whether a layer is a product with its input, and no table."""
    return not isinstance(layer, nn.Embedding)


class Duals(Tactic):
    """Every so many steps: lambda <- max(0, lambda + rate * slack), slack the mean over the batches of the last steps, in eval mode."""

    def __init__(self, rate: float = 0.05, every: int = 20, batches: int = 4, of: Lagrangian | None = None) -> None:
        self.rate, self.every, self.batches, self._of = rate, every, batches, of

    def start(self, loop: Loop) -> None:
        """Refuse several processes (two forwards before one backward) and checkpointing (a backward would run the wrong one of the two again)."""
        if self._of is not None and any(getattr(module, "gradient_checkpointing", False) for module in loop.model.modules()):
            raise RunError("the Lagrangian runs two networks in each step, and gradient checkpointing would run the low-bit one again for both: call "
                           "model.gradient_checkpointing_disable()")
        if self._of is not None and loop.accelerator.num_processes > 1:
            raise RunError(f"the Lagrangian runs two networks in each step, which {loop.accelerator.num_processes} processes do not wait for "
                           "rightly: run in one process")

    @torch.no_grad()
    def after(self, loop: Loop) -> None:
        if self._of is None or not self.rate or (loop.step + 1) % self.every:
            return
        total = torch.zeros_like(self._of.duals)
        steps = range(max(0, loop.step + 1 - self.batches), loop.step + 1)
        with judged(loop.model):
            for step in steps:
                batch = moved(loop.task.batch(step), device(loop.model))
                with high(loop.model):
                    logits = loop.task.logits(loop.model, batch)
                total += self._of.slacks(loop.model, batch, logits).cpu()
        self._of.duals = (self._of.duals + self.rate * total / len(steps)).clamp(min=0)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._of is None else {"duals": self._of.duals}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._of is not None:
            self._of.duals = state["duals"].clone()


def quantization_constraints(model: nn.Module, task: Task, *, bits: int = 2, input_bits: int | None = None, static: bool = False,
                             base: Literal["lsq", "dorefa"] = "lsq", constrained: bool = True, layerwise: bool = True, eps_out: float = 0.1,
                             eps_layer: float = 1 / 255, relative: bool = True, cross: bool = False, both: bool = False, dual_lr: float = 0.05,
                             duals: int = 20, dual_batches: int = 4, lr: float = 1e-3, scale_lr: float = 0.01, weight_decay: float = 0.0,
                             warmup: float = 0.05, steps: int = 400) -> nn.Module:
    """Train the full-precision network under the constraint that its low-bit self stays close, and give the low-bit one.

    Args:
        bits: bits of the weights, 2 to 8; with dorefa 1, too.
        input_bits: bits of the layers' inputs, 2 to 8; None leaves them in full precision.
        static: learn one step for each input tensor (encoders, vision) in place of a fresh one for each token.
        base: lsq, a learned step for each output channel; dorefa, the authors', for models that are trained from scratch or normed throughout.
        constrained: False trains the same quantizers by the task's loss alone, straight-through: the control.
        layerwise: constrain each layer, and not the output alone.
        eps_out: how far the outputs may be apart, in nats.
        eps_layer: how far a layer's outputs may be apart: mean squared error, as a share of the output's mean square if relative.
        relative: divide a layer's error by the mean square of its output.
        cross: compare outputs by cross entropy, as the authors do, in place of the divergence.
        both: let the shared weights hear the output's constraint through the low-bit network, too, straight-through.
        dual_lr: rate of the duals.
        duals: updates of the duals in the run.
        dual_batches: batches from which an update takes its slack.
        lr: peak learning rate of the weights.
        scale_lr: peak learning rate of the steps, as a share of each step's own size.
        weight_decay: of matrices only.
        warmup: share of the steps that warm up; a cosine to zero follows.
        steps: optimizer steps.

    Returns:
        The low-bit network, in eval mode, with its own batch norms; `qatlas_duals` on it says each constraint's final lambda.

    Raises:
        QuantError: bits that the base does not speak of. RunError: a base that does not exist, an eps or a rate below 0, several processes.
    """
    if min(eps_out, eps_layer, dual_lr) < 0 or duals < 1 or dual_batches < 1:
        raise RunError(f"eps_out={eps_out}, eps_layer={eps_layer}, dual_lr={dual_lr}, duals={duals}, dual_batches={dual_batches}: eps and rate are 0 "
                       "or more, updates and batches at least 1")
    weight, inputs = of_weight(base, bits), None if input_bits is None else of_input(input_bits, static)
    rule = Rule("*", weight=weight, input=inputs, adapter=Bounded() if base == "dorefa" else UNSET)
    quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER), rule], task)
    describe(model, task.probe()).check()
    lagrangian = None
    if constrained:
        pair(model)
        lagrangian = Lagrangian(task, model, eps_out=eps_out, eps_layer=eps_layer, layerwise=layerwise, relative=relative, cross=cross, both=both)
    fit(model, task, optimizer=AdamW(lr=lr, weight_decay=weight_decay, scale_share=scale_lr), schedule=cosine(warmup), steps=steps, loss=lagrangian,
        tactics=[Duals(dual_lr, max(1, steps // duals), dual_batches, lagrangian)])
    part(model)
    for layer in quantized(model).values():
        layer.merge()
    found = {} if lagrangian is None else dict(zip([*lagrangian.sites, "output"], lagrangian.duals.tolist(), strict=True))
    model.qatlas_duals = found  # type: ignore[assignment]
    return model


def of_weight(base: str, bits: int) -> Quant:
    """Of a weight: LSQ's, or DoReFa's even levels up to the largest of the bounded weight."""
    if base == "lsq":
        return Quant(signed(bits), PerChannel(), Learned(AbsMean(2.0, per_root=True)), Clip())
    if base != "dorefa":
        raise RunError(f"base={base!r}: the bases are lsq and dorefa")
    if bits not in range(1, 9):
        raise QuantError(f"DoReFa takes weights of 1 to 8 whole bits, not bits={bits!r}")
    return Quant(HalfStep(bits), PerTensor(), AbsMax(), Ste())
