"""PB-LLM: signs for most weights, 8 bits for the few that matter.

Yuzhang Shang, Zhihang Yuan, Qiang Wu, Zhen Dong, "PB-LLM: Partially Binarized Large Language Models", ICLR 2024, arXiv 2310.00034. Official code:
hahnyuan/PB-LLM; masks, both procedures and their defaults were checked in it, the training recipe in its scripts.

A language model whose every weight is a sign has forgotten everything. A small part of the weights, the *salient* ones, carry most of it: they keep 8
bits, all others become one bit. Which are salient is seen from their size, or from what rounding them to zero would cost:

    v = |w|                    magnitude
    v = w^2 / U_jj^2           hessian; U the upper Cholesky factor of (H + damp)^-1, H = 2/n sum x x^T      (core/compensate.py)
    salient: v among the largest `salient` of a matrix, or of `group` of its columns; ties fall to the signs

*Without training* (steps=0; the paper's PB-GPTQ), block by block, on inputs that come from quantized blocks: with M the mask, mu and a of the
weights that are not salient, in each row and group, q = M ? 8 bits : mu + a sign(w - mu), column by column, the error made good behind it:

    w_k <- w_k - (w_j - q_j) / U_jj U_jk,  k > j

*With training* all that is not salient is trained; the salient weights are 8-bit integers that stay as they are:

    W_sim = M ? W_8 : a sign(W),     a = mean|W| over what is not salient, of a row
    dW = a g where not salient, 0 where salient; a hears nothing and is measured anew in every forward

a is the least-squares step of the row on its signs, d/da |w - a sign(w)|^2 = 0. AdamW without decay at 1e-4, 5 % of warm-up, a cosine, the labels'
cross entropy; norms, embeddings and head stay as they were. What is stored: the mask in bits, 8 bits for each salient weight, one for each other:
1 + 8 r + (1 - r) bits a weight, 2.7 at 10 %. No format of others holds that, and each refuses it; the packed directory does, and gguf:f32 takes the
plain values.

Otherwise than the authors (`published=True` takes what they do at the first two):
- mu and a count the weights that are not salient; theirs without training divides by all columns, salient ones counted as zeros.
- One a for a row; theirs in training is one for the whole matrix, since their boolean indexing flattens (the paper says row).
- Their 8 bits in training round the smallest weight of a row to a whole number and wrap around below it: negative weights become positive. Ours
  are what they use without training: a row's range, zero included, over 255 steps.
- Their mask in training is both tails of the signed weights (`metric="tails"`); by size it is the same where the mean is zero.
- Salient weights are kept as integers beside the mask: neither decay nor momentum can move them. sign(0) = +1.
- With training, the Hessian is of full-precision inputs; theirs comes from a run without training before. The head stays full, theirs is binarized.
- `compensate` also starts a training from the compensated weights, which they do not.

Numbers of ours: docs/results.md#pb_llm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.compensate import Hessian, compensate, factor
from ..core.error import QuantError
from ..core.grain import Grain, Group, PerChannel, PerTensor
from ..core.grid import Grid, Sign, Uniform
from ..core.place import Place, decode, locate
from ..core.qtensor import Masked, QTensor
from ..core.quantizer import Known, Quant, Quantizer, working
from ..core.scale import AbsMean, MinMax, Scale
from ..layers.packed import PackedLinear
from ..layers.quantized import Layer
from ..model import artefact
from ..model.coverage import describe
from ..model.pack import pack
from ..model.quantized import quantized
from ..model.roles import Role
from ..model.rules import Decision, Rule, decided, keep_full
from ..train.fit import fit
from ..train.optim import AdamW
from ..train.schedule import cosine
from ..train.streams import Walk
from ..train.task import Task

CLAIM = "With 5 to 30 % of the weights in 8 bits the others can be signs, and a few thousand steps bring most of the ability back."
Metric = Literal["magnitude", "hessian", "tails"]
BLOCK = 128                                                       # columns whose errors are summed up before they reach the rest


@dataclass(frozen=True)
class Partial(Quant):
    """Signs times the mean of their sizes, but for the `salient` part of the weights, which keeps the numbers of `high` (None: its values as they
    are; nothing then can be stored). metric: how the mask is found where none is given, magnitude or tails."""

    grid: Grid = Sign()
    grain: Grain = PerChannel()
    scale: Scale = AbsMean()
    salient: float = 0.1
    metric: str = "magnitude"
    high: Quant | None = Quant(Uniform(8, False), PerChannel(), MinMax())

    @property
    def bits(self) -> float:  # type: ignore[override]
        return 1 + (1 - self.salient) + self.salient * (32 if self.high is None else self.high.bits)

    @property
    def label(self) -> str:
        return f"signs, {self.salient:.0%} {'full' if self.high is None else f'{self.high.bits}b'}"

    @property
    def several(self) -> str:
        return ("salient weights in 8 bits stand among signs, chosen one by one by a mask, and no block or layer of this format has a place for two "
                "kinds of codes; train without a target: the packed directory holds it, and gguf:f32 its plain values")

    def build(self) -> Partly:
        return Partly(self)

    def quantize(self, x: Tensor) -> Any:
        return self.build().initialise(x).quantize(x)

    def hard(self, x: Tensor) -> Tensor:
        return self.build().initialise(x).hard(x)


class Signs(torch.autograd.Function):
    """x, mask, kept values, a (all of x's shape, or broadcast) -> where(mask, kept, a sign x); dx = a g where not masked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, kept: Tensor, a: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(mask, a)
        return torch.where(mask, kept, decode(grid.snap(x), Place(a)))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        mask, a = ctx.saved_tensors
        return g * a * ~mask, None, None, None, None


class Partly(Quantizer):
    """The module of `Partial`: buffers `mask` (bool), `kept` (the salient codes in the order of rows, or values) and, with codes, the steps and zeros
    of their rows."""

    mask: Tensor
    kept: Tensor
    kept_scale: Tensor | None
    kept_zero: Tensor | None

    def __init__(self, quant: Partial) -> None:
        super().__init__(quant)
        for name in ("mask", "kept", "kept_scale", "kept_zero"):
            self.register_buffer(name, None)

    @property
    def ready(self) -> bool:
        return self.mask is not None

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Partly:
        if not torch.isfinite(x).all():
            raise QuantError(f"a tensor of shape {tuple(x.shape)} holds NaN or infinity; a mask found on it would spoil the layer")
        how: Any = self.quant
        return self.keep(x, tails(x, how.salient) if how.metric == "tails" else largest(x.abs(), how.salient))

    @torch.no_grad()
    def keep(self, x: Tensor, mask: Tensor) -> Partly:
        """From now on the elements of x where the mask is True are kept as they are now, in the numbers of `high`."""
        high, x = self.quant.high, working(x)  # type: ignore[attr-defined]
        self.mask, self.kept = mask, x[mask]
        if high is not None:
            q = high.quantize(x)
            self.kept, self.kept_scale, self.kept_zero = q.codes[mask], q.scale, q.zero
        return self

    def one(self) -> QTensor:
        """The salient part, as a tensor of the whole shape."""
        high = self.quant.high  # type: ignore[attr-defined]
        if high is None:
            raise QuantError("salient weights in full precision have no codes; give high= a Quant to store them")
        codes = torch.zeros(self.mask.shape, dtype=torch.uint8, device=self.mask.device).masked_scatter_(self.mask, self.kept)
        assert self.kept_scale is not None
        return QTensor(codes, self.kept_scale, self.kept_zero, None, high.grid, high.grain, high.scale.dtype)

    def step(self, x: Tensor) -> Tensor:
        """a: mean|x| over what is not salient, (groups, 1), as it is stored."""
        view, rest = self.quant.grain.view(working(x.detach()).abs()), self.quant.grain.view((~self.mask).to(working(x).dtype))
        return self.quant.scale.cast((view * rest).sum(-1, keepdim=True) / rest.sum(-1, keepdim=True).clamp(min=1))

    def forward(self, x: Tensor, shift: Tensor | None = None, known: Known | None = None) -> Tensor:
        if not self.on:
            return x
        if shift is not None:
            raise QuantError("an adapter in the grid has no place among signs; take inside, after or beside")
        kept = torch.zeros_like(x).masked_scatter_(self.mask, self.kept) if self.quant.high is None else self.one().dequantize()  # type: ignore
        a = self.quant.grain.back(self.step(x).expand_as(self.quant.grain.view(x)), x.shape)
        y = Signs.apply(working(x), self.mask, kept, a, self.quant.grid).to(x.dtype)
        return torch.lerp(x, y, self.blend) if self.training and self.blend < 1 else y

    @torch.no_grad()
    def known(self, x: Tensor, shift: Tensor | None = None, into: Tensor | None = None) -> Known:
        y = self.forward(x, shift)
        return Known(y if into is None else into.copy_(y), Place(self.step(x)))

    @torch.no_grad()
    def quantize(self, x: Tensor, shift: Tensor | None = None) -> Any:
        codes = self.quant.grid.encode(self.quant.grid.snap(working(x)))
        return Masked(self.mask.clone(), self.one(), QTensor(codes, self.step(x).squeeze(-1), None, None, self.quant.grid, self.quant.grain,
                                                             self.quant.scale.dtype))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        kinds = {"mask": torch.bool, "kept": torch.uint8 if self.quant.high is not None else torch.float32}  # type: ignore[attr-defined]
        for name in ("mask", "kept", "kept_scale", "kept_zero"):
            found, own = state.get(prefix + name), getattr(self, name)
            if found is not None and (own is None or own.shape != found.shape):
                setattr(self, name, torch.empty(found.shape, dtype=kinds.get(name, torch.float32), device=found.device))
        super()._load_from_state_dict(state, prefix, *rest)


def largest(v: Tensor, share: float) -> Tensor:
    """True for the `share` largest of v, a bool tensor of its shape; as in the authors' code the smallest of them, the threshold, is left out,
    and what ties with it.

    >>> largest(torch.tensor([[3.0, 1.0], [2.0, 4.0]]), 0.5)
    tensor([[False, False],
            [False,  True]])
    """
    if not 0 <= share <= 1:
        raise QuantError(f"salient={share:g}: a share of the weights, from 0 to 1")
    if share == 1:
        return torch.ones_like(v, dtype=torch.bool)
    return v > v.flatten().sort().values[min(int(v.numel() * (1 - share)), v.numel() - 1)]


def tails(w: Tensor, share: float) -> Tensor:
    """True beyond the share / 2 lowest and highest numbers, those themselves left out."""
    if not 0 <= share <= 1:
        raise QuantError(f"salient={share:g}: a share of the weights, from 0 to 1")
    order, n = w.flatten().sort().values, w.numel()
    low, high = int(n * share / 2), int(n * (1 - share / 2))
    return (w < order[low - 1] if low else torch.zeros_like(w, dtype=torch.bool)) | (w > order[high - 1] if high else w > order[0])


@torch.no_grad()
def rounded(w: Tensor, how: Partial, u: Tensor | None = None, *, metric: Metric = "magnitude", group: int | None = None, centred: bool = True,
            zeros: bool = False, compensated: bool = True, block: int = BLOCK) -> tuple[Masked, Tensor]:
    """A weight (out, in) in 8 bits and signs, and the weight as it was when each column's turn came.

    u: of `core.compensate.factor`; hessian and compensation need it. centred: signs of w - mu. zeros: mu and a count salient weights as zeros.
    """
    w, width = working(w), w.shape[1]
    size = width if group is None else group
    high: Any = how.high
    if size < 1 or width % size:
        raise QuantError(f"group={size}: a number of columns that divides the {width} there are")
    top, mask = high.measure(high.grain.view(w)), torch.zeros_like(w, dtype=torch.bool)
    s, m = torch.zeros(2, w.shape[0], width // size, dtype=w.dtype, device=w.device)

    for g in range(width // size):                                # all are taken from the weight as it is before anything is made good
        at = slice(g * size, (g + 1) * size)
        cost = w[:, at].abs() if u is None or metric != "hessian" else w[:, at].square() / u.diagonal()[at].to(w).square()
        mask[:, at] = tails(w[:, at], how.salient) if metric == "tails" else largest(cost, how.salient)
        rest = ~mask[:, at]
        n = torch.full_like(s[:, g], size) if zeros else rest.sum(-1).clamp(min=1)
        m[:, g] = (w[:, at] * rest).sum(-1) / n if centred else 0
        off = (w[:, at] * rest - m[:, g, None]).abs()
        s[:, g] = how.scale.cast((off if zeros else off * rest).sum(-1) / n)

    def snap(j: int, column: Tensor) -> Tensor:
        low = s[:, j // size] * how.grid.snap(column - m[:, j // size]) + m[:, j // size]
        place = Place(*(None if t is None else t.squeeze(-1) for t in top))  # type: ignore[arg-type]
        return torch.where(mask[:, j], decode(high.grid.snap(locate(column, place)), place), low)

    turned = w if u is None or not compensated else compensate(w, u, snap, block=block)
    grain = PerChannel() if size == width else Group(size)
    steps, offset = (s[:, 0], m[:, 0]) if size == width else (s, m)
    signs = how.grid.snap(grain.view(turned) - offset.unsqueeze(-1))
    other = QTensor(how.grid.encode(grain.back(signs, w.shape)), steps, None, offset if centred else None, how.grid, grain)
    codes = high.grid.encode(high.grid.snap(locate(turned, top)))
    one = QTensor(codes, top.s.squeeze(-1), None if top.zero is None else top.zero.squeeze(-1), None, high.grid, high.grain, high.scale.dtype)
    return Masked(mask, one, other), turned


def pb_llm(model: nn.Module, task: Task, *, salient: float = 0.1, metric: Metric = "hessian", group: int | None = None, centred: bool | None = None,
           compensate: bool | None = None, published: bool = False, damp: float = 0.01, batches: int = 32, lr: float = 1e-4, warmup: float = 0.05,
           steps: int = 400) -> nn.Module:
    """Binarize all but the salient weights, without training (steps=0) or with it.

    Args:
        salient: share of the weights that keep 8 bits, 0 to 1; the paper has 0.05 to 0.5.
        metric: what is salient: hessian (what rounding to zero would cost), magnitude, or tails (both ends of the signed weights).
        group: columns that share a mask threshold and, in a row, a step; only without training. None is the matrix.
        centred: signs of w - mu; None is True without training, and with training it must be False.
        compensate: make good each column's error in those behind it; None is True without training, False with it.
        published: count salient weights as zeros in mu and a (without training), take one step for the matrix (with it), as their code does.
        damp: part of the Hessian's mean diagonal that is added to it.
        batches: of the task, its first, on which the Hessian is gathered.
        lr: peak learning rate of the weights that are signs.
        warmup: share of the steps that warm up; a cosine to zero follows.
        steps: optimizer steps; 0 rounds only.

    Returns:
        The model in eval mode: packed layers without training, trained ones with it.

    Raises:
        QuantError: a share, metric or group that cannot work. FormatError: any target; none holds 8 bits among signs.
    """
    if metric not in ("magnitude", "hessian", "tails"):
        raise QuantError(f"metric={metric!r}: salient is what is so by hessian, magnitude or tails")
    if steps and (group is not None or centred):
        raise QuantError("with training a row has one step and no centre: group and centred are for steps=0")
    largest(torch.zeros(1), salient)                              # a share that cannot be is refused before anything moves
    how = Partial(grain=PerTensor() if published and steps else PerChannel(), salient=salient, metric="magnitude" if metric == "hessian" else metric)
    rules = [*keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER), Rule("*", weight=how)]
    made = {"metric": metric, "group": group, "centred": not steps if centred is None else centred, "zeros": published and not steps,
            "compensated": not steps if compensate is None else compensate}
    blockwise(model, task, decided(model, rules, task), how, made, batches, damp, bool(steps))
    if not steps:
        pack(model)
    describe(model, task.probe()).check()
    if steps:
        names = [name for name, layer in quantized(model).items() if isinstance(layer.weight_quantizer, Partly)]
        fit(model, task, train=[f"{name}.weight" for name in names], optimizer=AdamW(lr=lr), schedule=cosine(warmup), steps=steps)
    return model


def blockwise(model: nn.Module, task: Task, decision: Decision, how: Partial, made: dict[str, Any], batches: int, damp: float, train: bool) -> None:
    """Put the layers in place: packed ones behind quantized blocks, or with `train` trainable ones whose masks come from full-precision inputs."""
    mine = [name for name, slots in decision.layers.items() if slots.weight == how]
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in mine}
    if wrong := [name for name, w in weights.items() if w.dim() != 2]:
        raise QuantError(f"{wrong[0]} is a {type(model.get_submodule(wrong[0])).__name__}; PB-LLM is for linear layers: keep it full by a rule")
    asks = made["metric"] == "hessian" or made["compensated"]
    if asks:
        walk = Walk(model, task, batches)
        for i, block in enumerate(walk.names):
            names = [name for name in mine if name.startswith(f"{block}.")]
            found = gathered(walk, i, names)
            if train:
                walk.push(i, walk.full)
            for name in names:
                put(model, name, decision, how, made, factor(found[name].value, damp), train)
            decision.carry_out(model, lambda name, block=block: name.startswith(f"{block}.") and name not in mine)  # type: ignore[misc]
            if not train:
                walk.push(i, walk.full)
        walk.close()
    done = {name for name, module in model.named_modules() if isinstance(module, Layer)}
    for name in mine if not train else ():                        # what lies outside of the blocks, or is asked for nothing: by size
        if name not in done:
            put(model, name, decision, how, made | {"metric": "magnitude" if made["metric"] == "hessian" else made["metric"]}, None, train)
    decision.carry_out(model, lambda name: name not in done and (train or name not in mine))
    decision.close()


def put(model: nn.Module, name: str, decision: Decision, how: Partial, made: dict[str, Any], u: Tensor | None, train: bool) -> None:
    """One layer, rounded and packed; or trainable, with the mask (and with compensation the weight) that rounding found."""
    module: Any = model.get_submodule(name)
    w = module.weight.detach() if isinstance(module, nn.Linear) else module.weight.detach().T
    q, turned = rounded(w, how, u, **made)
    if not train:
        artefact.put(model, {name: PackedLinear.holding(q, module, decision.layers[name])})
        return
    decision.carry_out(model, lambda other: other == name)
    layer: Any = model.get_submodule(name)
    if made["compensated"]:
        with torch.no_grad():
            layer.weight.copy_(layer.unmatrix(turned))
    layer.weight_quantizer.keep(layer.matrix().detach(), q.mask)


def gathered(walk: Walk, i: int, names: list[str]) -> dict[str, Hessian]:
    """The Hessian of the inputs of some layers of block i, while the stream goes through it; padding does not count."""
    found = {name: Hessian(0) for name in names}
    now = [0]

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, mask = args[0], walk.masks[now[0]]
            if not found[name].count:
                found[name] = Hessian(x.shape[-1])
            found[name].add(x if mask is None or x.shape[:2] != mask.shape else x[mask.to(x.device)])
        return hook

    hooks = [walk.model.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    try:
        for k, _ in walk.outputs(i, walk.full):
            now[0] = k + 1
    finally:
        for hook in hooks:
            hook.remove()
    return found
