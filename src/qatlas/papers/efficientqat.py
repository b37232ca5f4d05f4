"""EfficientQAT: all of one block at a time, then the steps of all blocks at once.

Mengzhao Chen, Wenqi Shao, Peng Xu, Jiahao Wang, Peng Gao, Kaipeng Zhang, Ping Luo, ACL 2025, arXiv 2407.11062. Official code: OpenGVLab/EfficientQAT;
quantizer, both phases, packing and recipe were checked in it.

Training a whole language model under quantizers is dear. Two cheap phases take its place. *Block-AP*: one transformer block at a time, all of it
(weights, steps, zero points, gains of the norms) is trained to give what the block gave in full precision, from what the quantized blocks before it
give. *E2E-QP*: weights become integer codes and stay so; only the steps are trained, on the loss of the task, through the whole model. In memory
are one block, then codes.

    w_hat = s (q - z),   q = clip(round(w / s) + z, 0, 2^b - 1)            s, z for each group of inputs, z rounded and kept in 0 .. 2^b - 1
    dw = g inside, 0 outside                                               inside: where round(w / s) + z is a code
    ds = sum g (round(u) - u) inside, g (q - z) outside,  u = w / s        no gradient factor
    dz = sum -s g outside, 0 inside
    Block-AP    min |block_q(X_q) - block(X_f)|^2                          X_q behind quantized blocks, X_f in the full-precision model
    E2E-QP      ds = sum g (q - z)                                         exact: nothing is rounded any more

Start: the range of the group, s = (max - min) / (2^b - 1) with a floor of 1e-4, z = round(-min / s). AdamW without decay, a cosine in both phases:
Block-AP falls to a twentieth, its gradients are not cut; E2E-QP warms up for 3 % of its steps and cuts the norm at 0.3. Embeddings, last norm and
head stay in full precision and untrained. A packed layer dequantizes on the way (layers/packed.py) and its steps are parameters: phase two is `fit`.

Otherwise than the authors:
- The range of a group holds 0: a group of equal weights is destroyed by theirs, since its zero point lies far outside of the codes.
- x / s + z is rounded once, after the zero is added: only exact ties with an odd zero differ.
- A group lies in one row; theirs may run over the end of one.
- Codes stay as they are between the phases; they pack round((w_hat + s z) / s) with the step in fp16, unclipped. With a target, steps are fp16 in the
  forward from the beginning, so the codes are those of the steps that are stored.
- Their batches are 2 samples; here they are the task's, kept together as they were recorded, each epoch in another order. No early stopping.
- Learning rates are theirs, for thousands of steps. Some hundred steps on a small model want 1e-3 for weights and steps alike.
- `zero="offset"` learns an offset in values in place of a zero point (llama.cpp's Q4_1, Q4_K), `zero="none"` none (Q4_0 at 4 bits).

Numbers of ours: docs/results.md#efficientqat.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from ..core.error import QuantError
from ..core.estimator import Clip
from ..core.grain import Grain, Group, PerChannel
from ..core.grid import Uniform
from ..core.quantizer import Quant
from ..core.scale import AbsMax, Learned, MinMax
from ..model.coverage import describe
from ..model.pack import pack
from ..model.roles import Role
from ..model.rules import Rule, keep_full, quantize
from ..train.fit import fit
from ..train.optim import AdamW
from ..train.reconstruct import reconstruct
from ..train.schedule import cosine
from ..train.task import Task

CLAIM = "Block by block, then steps alone: a 70B model at 2 bits in 41 hours of one card, less than 3 points lost."
Zero = Literal["integer", "offset", "none"]
FLOOR = 1e-4                                                      # of a step


def efficientqat(model: nn.Module, task: Task, *, bits: int = 2, group: int | None = 64, zero: Zero = "integer", batches: int = 32,
                 block_steps: int | None = None, block_lr: float | None = None, block_scale_lr: float = 1e-4, lr: float | None = None,
                 steps: int = 128, streams: str | None = None) -> nn.Module:
    """Train block by block, then the steps of the packed model end to end.

    Args:
        bits: bits of the weights, 2 to 8; the paper has 2, 3 and 4.
        group: inputs that share a step and a zero; None is one of each for an output channel.
        zero: integer (a learned zero point), offset (a learned offset in values) or none (a grid around zero).
        batches: of the task, its first, which go through the blocks; the paper has 2048 of 2 samples.
        block_steps: optimizer steps of each block; None is as many as of the second phase, 0 leaves the first phase out.
        block_lr: peak learning rate of a block's weights and norms; None is the paper's, 2e-5 at 2 bits, 1e-5 above; 0 trains steps and zeros only.
        block_scale_lr: peak learning rate of a block's steps and zeros.
        lr: peak learning rate of the steps end to end; None is the paper's, 2e-5 at 2 bits and 1e-5 above.
        steps: optimizer steps end to end; 0 leaves the second phase out.
        streams: a directory for what goes from block to block; None keeps it in memory.

    Returns:
        The model, its layers packed (codes, and steps as parameters), in eval mode.

    Raises:
        QuantError: bits or a kind of zero that there is not.
    """
    weight = of_weight(bits, Group(group) if group is not None else PerChannel(), zero)
    rules = [*keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER), Rule("*", weight=weight)]
    slow = 2e-5 if bits == 2 else 1e-5
    per_block = steps if block_steps is None else block_steps
    if per_block:
        reconstruct(model, task, rules=rules, train=["*weight", "*weight_quantizer.*"], steps=per_block, batches=batches, packed=True,
                    optimizer=AdamW(lr=slow if block_lr is None else block_lr, scale_lr=block_scale_lr), schedule=cosine(end=1 / 20),
                    streams=streams)
    else:
        quantize(model, rules, task)
    pack(model)
    describe(model, task.probe()).check()
    if steps:
        fit(model, task.later(batches if per_block else 0), train="*.store.scale", optimizer=AdamW(lr=slow if lr is None else lr),
            schedule=cosine(0.03), steps=steps, clip=0.3)
    return model


def of_weight(bits: int, grain: Grain, zero: Zero = "integer") -> Quant:
    """All that is said about a weight of so many bits.

    >>> of_weight(2, Group(64)).grid
    Uniform(bits=2, signed=False, narrow=False)
    """
    if bits not in range(2, 9):
        raise QuantError(f"EfficientQAT takes weights of 2 to 8 whole bits, not bits={bits:g}")
    starts = {"integer": MinMax(floor=FLOOR), "offset": MinMax("offset", floor=FLOOR), "none": AbsMax()}
    if zero not in starts:
        raise QuantError(f"zero={zero!r}: a group has a zero of its own as one of {', '.join(starts)}")
    return Quant(Uniform(bits, zero == "none"), grain, Learned(starts[zero], factor=1.0, margin=0.5, floor=FLOOR), Clip(0.5))
