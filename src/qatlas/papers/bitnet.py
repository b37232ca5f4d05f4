"""BitNet: language models of one bit, and of three values.

Hongyu Wang et al., "BitNet: Scaling 1-bit Transformers for Large Language Models", 2023, arXiv 2310.11453 (b1). Shuming Ma et al., "The Era of
1-bit LLMs: All Large Language Models are in 1.58 Bits", 2024, arXiv 2402.17764 (b1.58). Shuming Ma et al., "BitNet b1.58 2B4T Technical Report",
2025, arXiv 2504.12285. Official code: microsoft/BitNet, inference only. Numbers were held against transformers' BitNet layers; the training recipe
is from memory of the papers and of their "Training Tips, Code and FAQ", since no training code is public there.

A linear layer whose weights are -1, 0 and 1 needs additions only. Trained that way from the first step a model loses little, the papers say. Latent
weights stay in full precision and are quantized afresh in every forward; nothing is learned but they:

    W_hat = s clip(round(W / s), -1, 1),         s = mean|W| over the matrix          b1.58
    W_hat = s sign(W - mean W),                  s = mean|W| over the matrix          b1
    x_hat = t clip(round(x / t), -128, 127),     t = max|x| / 127 for each token
    y = x_hat W_hat^T,     dW = dy^T x_hat,     dx = dy W_hat

The straight-through gradient has no mask, and s and t hear none. Three more parts make it work:

    SubLN        a norm in front of the output projection and of the down projection, whose inputs are not normed otherwise (`sub_norm`)
    two stages   a high learning rate that falls along a line; from the middle on at two thirds of that line, and with no weight decay:
                 the size of a latent weight is its confidence in its sign, and decay would keep unsettling it (`two_stage`)
    lambda       a trained model would be destroyed by such quantizers at a blow. They are let in by and by, w + lambda (W_hat - w) and the same for
                 x, lambda rising to 1 (`ramp`; transformers' recipe for fine-tuning). A model from scratch has nothing to lose and takes none

`scratch` draws the weights anew as the model's own class does: a second model is built from the configuration, under the run's seed. For
transformers' Llama these are normal weights of deviation `initializer_range`, norms of 1 and biases of 0.

Otherwise than the authors: the model is anyone's, unmodified. So rotary positions, SwiGLU and biases stay as they are (2B4T has a squared ReLU and
no biases), pre-norms too (b1.58's FAQ moves them into the layers; SubLN here is 2B4T's). In a trained model a new norm is a stranger, so `sub_norm`
is off by default and meant for `scratch`. It becomes a part of the layer: packed directories hold it; a target is refused with it, since
llama.cpp's Llama has no such norm (llama.cpp's BitNet architecture has attn_sub_norm and ffn_sub_norm; we do not write it yet). Sign(0) is +1
here. Products are computed in floating point from the quantized values, not in integers. What the papers give in steps (375 of warm-up, 1000 of
lambda) are shares of the run here. The learning rate of the second half is two thirds of what the line would give there: the peaks of the
paper's table, 1.5e-3 and 1e-3 at 700 M, read so that the rate drops in the middle. Embeddings and the head stay in full precision.

Numbers of ours: docs/results.md#bitnet. In short runs on a small model three values come out ahead of full precision, and SubLN behind no norm.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.centred import Centred
from ..core.error import FormatError, QuantError, RuleError
from ..core.estimator import Ste
from ..core.grain import PerTensor, PerToken
from ..core.grid import Sign, Ternary, Uniform
from ..core.quantizer import Quant
from ..core.scale import AbsMax, AbsMean
from ..layers.norm import Norm
from ..model.blocks import blocks
from ..model.coverage import describe
from ..model.fresh import renew
from ..model.quantized import reachable
from ..model.roles import Role
from ..model.rules import Rule, keep_full, quantize
from ..model.signals import attentions
from ..train import schedule
from ..train.fit import fit
from ..train.optim import AdamW
from ..train.tactic import NoDecay, Ramp
from ..train.task import Task

CLAIM = "Trained from scratch, three values a weight and 8-bit activations match a 16-bit transformer of the same size, from 3B parameters on."
FLOOR = 1e-5                                                      # of mean|W| and of max|x|, the authors'
LET_IN = 0.25                                                     # of a fine-tuning: the part during which lambda rises


def bitnet(model: nn.Module, task: Task, *, bits: float = 1.58, input_bits: int | None = 8, scratch: bool = False, sub_norm: bool = False,
           ramp: float | None = None, two_stage: bool = True, lr: float = 1e-3, weight_decay: float = 0.1, warmup: float = 0.05,
           steps: int = 400) -> nn.Module:
    """Train all weights under ternary or binary quantizers, from scratch or from where the model is.

    Args:
        bits: bits of the weights, 1.58 (-1, 0, 1) or 1 (the sign).
        input_bits: bits of the layers' inputs, 2 to 8, one fresh step for each token; None leaves them in full precision.
        scratch: draw the weights anew, as the model's class does, in place of fine-tuning those that are there.
        sub_norm: put a norm in front of output and down projections; meant for training from scratch, and no export holds it.
        ramp: share of the steps during which the quantizers are let in; None is a quarter, and none from scratch.
        two_stage: learning rate along a line that drops in the middle, weight decay in the first half only; else one cosine, and decay to the end.
        lr: peak learning rate; from scratch the authors take 1.5e-3 at 700 M parameters.
        weight_decay: of matrices only.
        warmup: share of the steps that warm up.
        steps: optimizer steps.

    Returns:
        The model, its layers quantized and trained, in eval mode.

    Raises:
        QuantError: bits that BitNet does not speak of.
        FormatError: sub_norm with a target.
        RuleError: sub_norm on a model whose output or down projections are not found.
        RunError: scratch on a model that is not transformers'.
    """
    if sub_norm and task.target:
        raise FormatError(f"sub_norm=True and the target {task.target} do not go together: that file's Llama has no norm in front of its output and "
                          "down projections. llama.cpp's BitNet architecture has (attn_sub_norm, ffn_sub_norm), which we do not write yet. "
                          "Train without sub_norm, or without a target for the packed directory")
    weight, inputs = of_weight(bits), None if input_bits is None else of_input(input_bits)
    if scratch:
        renew(model, task.run.seed)
    norms = [Rule(name, norm=Norm()) for name in unnormed(model)] if sub_norm else []
    quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER), *norms, Rule("*", weight=weight, input=inputs)], task)
    describe(model, task.probe()).check()
    let_in = (0.0 if scratch else LET_IN) if ramp is None else ramp
    rates = schedule.two_stage(warmup) if two_stage else schedule.cosine(warmup)
    fit(model, task, optimizer=AdamW(lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95)), schedule=rates, steps=steps,
        tactics=[Ramp(let_in), NoDecay(0.5 if two_stage else 1.0)])
    return model


def of_weight(bits: float) -> Quant:
    """Of a weight: one scale for the matrix, its mean absolute value, measured anew in every forward."""
    if bits not in (1, 1.58):
        raise QuantError(f"BitNet takes weights of 1 or 1.58 bits, not bits={bits:g}")
    scale = AbsMean(floor=FLOOR)
    return Centred(Sign(), PerTensor(), scale, Ste()) if bits == 1 else Quant(Ternary(), PerTensor(), scale, Ste())


def of_input(bits: int = 8) -> Quant:
    """Of a layer's input: one step a token, its largest value on the end of the grid."""
    if bits not in range(2, 9):
        raise QuantError(f"BitNet takes inputs of 2 to 8 whole bits, not input_bits={bits:g}")
    grid = Uniform(bits)
    return Quant(grid, PerToken(), AbsMax(floor=FLOOR / grid.high), Ste())


def unnormed(model: nn.Module) -> list[str]:
    """Names of the output projection and of the down projection of each block: the layers in front of which SubLN stands.

    The output projection is attention's (model.signals). The down projection is the last linear layer of the rest of the block that is as wide as
    the output projection, with all that share its last name (experts).

    Raises:
        RuleError: a block where one of the two is not found.
    """
    linears = {name: kind for name, kind in reachable(model).items() if kind.__name__ in ("QLinear", "QTransposed")}
    near, found = attentions(model), []
    for block, _ in blocks(model):
        inner = [one for name, one in near.items() if name.startswith(f"{block}.")]
        outs = [one.out for one in inner if one.out in linears]
        taken = (*outs, *(f"{one.name}." for one in inner))
        rest = [name for name in linears if name.startswith(f"{block}.") and not name.startswith(taken)]
        width = _width(model, outs[0]) if outs else 0
        downs = [name for name in rest if _width(model, name) == width]
        if not outs or not downs:
            raise RuleError(f"sub_norm=True: {block} of {type(model).__name__} has no {'down' if outs else 'output'} projection that is a linear "
                            f"layer; its linear layers: {', '.join([*outs, *rest]) or 'none'}. Train with sub_norm=False, or write rules with "
                            "norm=Norm() yourself")
        found += [*outs, *(name for name in downs if name.rpartition(".")[2] == downs[-1].rpartition(".")[2])]
    return found


def _width(model: nn.Module, name: str) -> int:
    """How many outputs a linear layer has."""
    module: Any = model.get_submodule(name)
    return int(module.bias.shape[0]) if getattr(module, "bias", None) is not None else int(getattr(module, "out_features", getattr(module, "nf", 0)))
