"""LR-QAT: low-rank quantization-aware training of language models.

Yelysei Bondarenko, Riccardo Del Chiaro, Markus Nagel, 2024, arXiv 2406.06385. Official code: Qualcomm-AI-research/LR-QAT, against whose numbers the
layer is held (tests/golden_maps/lrqat.py).

Training all weights for low bits needs all of full training's memory. LR-QAT keeps the weights frozen, as their places on the grid, one byte each,
and trains a low-rank product inside the rounding, in units of the grid:

    u0 = phi(w / s0)                            once; w is gone. phi: 8-bit fixed point, or a cast (`store`)
    v  = clip(round(u0 + (alpha / r) B A))      w_hat = s v,     y = w_hat x
    with a zero (symmetric=False):              v = clip(round(u0 + (alpha / r) B A) + z),     w_hat = s (v - z)

s0 is the step at the start and stays in u0; s begins as s0 and is trained by itself. With G = dL/dw_hat and M = 1 where the rounded place lies on the
grid:

    dA = (alpha / r) B^T (s G M),     dB = (alpha / r) (s G M) A^T
    ds = sum G (v - z), with no term of u and no factor,     dz = - s sum G (1 - M)

B starts at zero, so the first step is round-to-nearest (of phi). The place, v and w_hat are computed again in the backward pass
(layers/recomputed.py). At the end v are the codes: nothing is merged by rounding a second time, and inference knows of no adapter. With lr = 0 only
the steps learn (PEQA). Steps start where the error to the fourth power is least (`MseSearch`), over 100 steps from the largest value down.

Inputs (`input_bits`) have a fresh asymmetric step for each token. `cache_bits` does the same to keys and values, inside attention: W4A8KV4 is
input_bits=8, cache_bits=4. Targets hold weights, and inputs where they say so; a cache in training is not part of any of them.

Otherwise than the authors: the zero of an input is a whole number (theirs is not rounded, and no integer artefact holds it). Their low-rank layer has
no zero and their fixed point asserts a signed grid, though the paper's rows of 2 bits are asymmetric; the formula above is what they mean. The step's
rate is a share of each step's own size: their 1e-5 beside steps of about 0.01 is 1e-3. Their 10,000 steps of 32 x 1,024 tokens are `steps`
here, and 1,000 of warm-up a tenth of them. Norms, embeddings and the head stay frozen and in full precision, as in their main setup.

Numbers of ours: docs/results.md#lowrank; memory: docs/performance.md.
"""

from __future__ import annotations

from torch import nn

from ..core.error import QuantError
from ..core.estimator import Clip
from ..core.grain import Group, PerChannel, PerToken
from ..core.grid import Uniform
from ..core.quantizer import Quant
from ..core.scale import AbsMax, Learned, MinMax, MseSearch, Scale
from ..layers.adapter import Lora
from ..layers.frozen import Places
from ..model.coverage import describe
from ..model.roles import Role
from ..model.rules import Rule, keep_full, quantize
from ..train.fit import fit
from ..train.optim import AdamW
from ..train.schedule import linear
from ..train.task import Task

CLAIM = "Matches or beats training all weights, in a fraction of the memory (7B on one card of 24 GB)."
TRAINED = ("*.adapter.*", "*.weight_quantizer.*")


def lr_qat(model: nn.Module, task: Task, *, bits: int = 4, group: int | None = None, symmetric: bool = True, input_bits: int | None = None,
           cache_bits: int | None = None, rank: int = 32, alpha: float = 1.0, store: str = "fixed", power: float | None = 4.0, lr: float = 1e-3,
           scale_lr: float = 1e-3, warmup: float = 0.1, steps: int = 400) -> nn.Module:
    """Train a low-rank product inside the rounding of each linear layer, and the steps; the weights stay frozen at one byte each.

    Args:
        bits: bits of the weights, 2 to 7 (8 with a store of floats or integers).
        group: inputs that share a step; None is one step for each output channel.
        symmetric: signed integers; False adds a learned zero point (the paper's 2 bits).
        input_bits: bits of the layers' inputs, 2 to 8, one fresh asymmetric step for each token; None leaves them in full precision.
        cache_bits: bits of keys and values in attention, likewise.
        rank: of the product.
        alpha: the product is multiplied with alpha / rank.
        store: how the frozen places are kept: fixed (8-bit fixed point), integer, float32, bfloat16, float16.
        power: steps start where the mean error to this power is least; None takes the largest value.
        lr: peak learning rate of the product, in steps of the grid; 0 trains the steps alone.
        scale_lr: that of the steps (and zeros), as a share of each step's own size.
        warmup: share of the steps that warm up; a straight line to zero follows.
        steps: optimizer steps.

    Returns:
        The model with its places and products, in eval mode. Packing makes codes of both.

    Raises:
        QuantError: bits that LR-QAT, or the store, does not speak of.
    """
    weight = of_weight(bits, group, symmetric, power)
    inputs, product = of_token(input_bits, "input_bits"), Lora(rank, alpha, "shift")
    rules = [*keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER),
             Rule("*", weight=weight, input=inputs, adapter=product, frozen=Places(store), keep="recompute")]
    if cache := of_token(cache_bits, "cache_bits"):
        rules += [Rule(f"@attention:{signal}", signal=cache) for signal in ("key", "value")]
    Places(store).build(weight)                                   # refuses bits that it cannot hold
    quantize(model, rules, task)
    describe(model, task.probe()).check()
    fit(model, task, train=TRAINED, optimizer=AdamW(lr=lr, betas=(0.9, 0.95), scale_share=scale_lr), schedule=linear(warmup), steps=steps)
    return model


def of_weight(bits: int, group: int | None, symmetric: bool, power: float | None) -> Quant:
    """Of a weight: whole numbers at a step that hears ds = sum G (v - z)."""
    if bits not in range(2, 9):
        raise QuantError(f"LR-QAT takes weights of 2 to 8 whole bits, not bits={bits:g}")
    first: Scale = AbsMax() if symmetric else MinMax()
    first = first if power is None else MseSearch(first, 100, 1.0, power)
    return Quant(Uniform(bits, symmetric), PerChannel() if group is None else Group(group), Learned(first, gradient="value", factor=1.0, margin=0.5),
                 Clip(0.5))


def of_token(bits: int | None, name: str) -> Quant | None:
    """Of an input, a key or a value: a fresh range for each token, with an integer zero."""
    if bits is None:
        return None
    if bits not in range(2, 9):
        raise QuantError(f"LR-QAT quantizes activations to 2 to 8 whole bits, not {name}={bits:g}")
    return Quant(Uniform(bits, False), PerToken(), MinMax())
