"""Fold: a batch norm into the convolution or linear layer in front of it, so that no engine meets it and no quantizer stands between the two.

    r = gamma / sqrt(var + eps)        W' = r W        b' = r (b - mean) + beta        (r for each output channel)

**Before training**: `fold(model)`, then `quantize(model, rules)`. The layers train with the weights that the engine will have, and a learned step
starts from them. What the norm did in training (normalise by the batch) is gone: take a smaller learning rate than with norms.

**After training** a quantized weight s v becomes (|r| s) (sign(r) v): the step takes the size, the codes take the sign. So each channel needs a step
of its own, and where a gamma is negative the grid must have -v for each v: Uniform(4, narrow=True), Ternary(), not Uniform(4), whose -8 has no +8.
The codes are compared; what would move one is refused.

That a norm follows a layer, and follows it alone, is proven and not read from names. A probe forward shows which tensor goes into the norm: it must
be the very tensor that the layer gave, untouched since (adjacent.py). Then all quantizers are off, the norms get random statistics (a fresh norm has
mean 0 and variance 1, and would change nothing that could be seen), and the output with and without the fold must agree; a second user of the layer's
output, a shortcut, say, shows itself there. What the probe does not run (a branch that this input does not take) it cannot see.

A norm that cannot be folded is an error with its name and the reason; `names` says which ones are meant. Where the model goes, the fold goes: the
names are kept as `qatlas_folded`, in config.json too, and from_pretrained gives the layers their bias before it reads the file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.error import CheckpointError, QuantError
from ..core.grain import Group, PerChannel
from ..core.quantizer import Quantizer
from ..layers.quantized import Quantized
from .adjacent import LAYERS, NORMS, SHOWN, adjacent
from .probe import drawn, output

CLOSE = 1e-5                                                      # of the largest output: two orders of fp32 sums
PROVEN = 1e-4                                                     # the same under random statistics, which a deep net may blow up


@torch.no_grad()
def fold(model: nn.Module, batch: Any = None, names: str = "*") -> nn.Module:
    """Fold the batch norms of a model into the layers in front of them, in place, and return it.

    Args:
        batch: what the probe forward runs on; made from the config of a transformers model where it is not given.
        names: a glob on the names of the norms; the others stay.

    Raises:
        QuantError: no such norm, or one that cannot be folded, by name; the model is then as it was.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    >>> fold(net, torch.randn(2, 3, 8, 8))
    Sequential(
      (0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    )
    """
    batch = drawn(model) if batch is None else batch
    pairs = adjacent(model, batch, names)
    modules = dict(model.named_modules())
    _prove(model, batch, pairs, modules)
    before, undo = output(model, batch), []
    try:
        for norm, layer in pairs.items():
            undo.append(_folded(model, modules[layer], modules[norm], layer))
        off = _apart(before, output(model, batch))
        if not off <= CLOSE:
            raise QuantError(f"folding {len(pairs)} batch norms moves the output by {off:.1e} of the largest, more than {CLOSE:g}: statistics with "
                             "a variance near 0, or values that fp32 cannot hold; nothing was folded")
    except QuantError:
        for back in reversed(undo):
            back()
        raise
    model.qatlas_folded = folded(model) | pairs  # type: ignore[assignment]
    return model


def folded(model: nn.Module) -> dict[str, str]:
    """Norm -> the layer that it was folded into."""
    return dict(getattr(model, "qatlas_folded", {}))  # type: ignore[arg-type]


def blank(model: nn.Module, pairs: Mapping[str, str]) -> Callable[[], None]:
    """Give an empty model the shape of a folded one: no norm, a bias. What the file holds comes later. What takes it back is returned.

    Raises:
        CheckpointError: names that are no norm and no layer of this model.
    """
    modules, before = dict(model.named_modules()), folded(model)
    undo: list[tuple[nn.Module, nn.Module, Any, Any]] = []
    for name, layer in pairs.items():
        if not isinstance(modules.get(name), NORMS) or not isinstance(modules.get(layer), LAYERS):
            raise CheckpointError(f"the file folds {name!r} into {layer!r}, and {type(model).__name__} has no such norm and layer; it belongs to "
                                  "another model or another version of it")

    def back() -> None:
        for stand, norm, target, bias in undo:
            target.bias = bias
            _replace(model, stand, norm)
        model.qatlas_folded = before  # type: ignore[assignment]

    for name, layer in pairs.items():
        target: Any = modules[layer]
        undo.append((nn.Identity(), modules[name], target, target.bias))
        if target.bias is None:
            target.bias = nn.Parameter(torch.zeros(len(target.weight), device=target.weight.device, dtype=target.weight.dtype))
        _replace(model, modules[name], undo[-1][0])
    model.qatlas_folded = dict(pairs)  # type: ignore[assignment]
    return back


def _prove(model: nn.Module, batch: Any, pairs: Mapping[str, str], modules: Mapping[str, Any]) -> None:
    """Fold under random statistics, and see that the output stays; the model is then as it was.

    Raises:
        QuantError: the norms whose folding alone moves the output.
    """
    def off(some: Mapping[str, str]) -> float:
        before, undo = output(model, batch), []
        try:
            for norm, layer in some.items():
                undo.append(_plain(model, modules[layer], modules[norm]))
            return _apart(before, output(model, batch))
        finally:
            for back in reversed(undo):
                back()

    with _disguised([modules[name] for name in pairs]):
        if off(pairs) <= PROVEN:
            return
        guilty = {norm: moved for norm, layer in pairs.items() if (moved := off({norm: layer})) > PROVEN}
    said = ", ".join(f"{norm} (by {moved:.1e} of the largest)" for norm, moved in list(guilty.items())[:SHOWN])
    raise QuantError(f"folding moves the output: {said or 'all norms together'}. What the layer in front gives goes somewhere else, too, a shortcut, "
                     "say, which would then get the folded values; nothing was folded")


@contextlib.contextmanager
def _disguised(norms: list[Any]) -> Iterator[None]:
    """Random statistics, gains of both signs; afterwards all is as it was."""
    kept = [{key: value.clone() for key, value in norm.state_dict().items()} for norm in norms]
    draw = torch.Generator().manual_seed(0)
    try:
        for norm in norms:
            for name, spread, shift in (("weight", 1.0, 0.5), ("bias", 0.2, -0.1), ("running_mean", 0.2, -0.1), ("running_var", 1.0, 0.5)):
                value = getattr(norm, name)
                if value is not None:
                    drawn = torch.rand(value.shape, generator=draw) * spread + shift
                    value.copy_(drawn * torch.randint(0, 2, value.shape, generator=draw).mul(2).sub(1) if name == "weight" else drawn)
        yield
    finally:
        for norm, state in zip(norms, kept, strict=True):
            norm.load_state_dict(state)


def _ratio(norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    """r, mean and beta, in double precision."""
    gain = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight.detach()
    beta = torch.zeros_like(norm.running_var) if norm.bias is None else norm.bias.detach()
    return gain.double() / (norm.running_var.double() + norm.eps).sqrt(), norm.running_mean.double(), beta.double()


def _plain(model: nn.Module, layer: Any, norm: Any) -> Callable[[], None]:
    """Fold without a thought of quantizers; what takes it back."""
    r, mean, beta = _ratio(norm)
    weight, bias = layer.weight.detach().clone(), layer.bias
    before = torch.zeros_like(mean) if bias is None else bias.detach().double()
    layer.weight.copy_((weight.double() * r.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype))
    layer.bias = nn.Parameter((r * (before - mean) + beta).to(weight.dtype))
    stand = nn.Identity().train(norm.training)
    _replace(model, norm, stand)

    def back() -> None:
        layer.weight.copy_(weight)
        layer.bias = bias
        _replace(model, stand, norm)

    return back


def _folded(model: nn.Module, layer: Any, norm: Any, name: str) -> Callable[[], None]:
    """Fold, and of a quantized layer see that the codes stay, but for their sign; what takes it back."""
    if not isinstance(layer, Quantized):
        return _plain(model, layer, norm)
    if why := _why_not_quantized(layer, _ratio(norm)[0]):
        raise QuantError(f"{name} is quantized, and the norm behind it cannot be folded any more: {why}. Fold before `quantize`; nothing was folded")
    quantizer: Any = layer.weight_quantizer
    if quantizer is None:
        return _plain(model, layer, norm)
    r = _ratio(norm)[0].to(layer.weight.dtype)
    turned = layer.quantize().values() * r.sign().reshape(-1, *[1] * (layer.weight.dim() - 1))
    step = None if quantizer.scale is None else quantizer.scale.detach().clone()
    undo = _plain(model, layer, norm)

    def back() -> None:
        undo()
        if step is not None:
            quantizer.scale.copy_(step)
        layer.refresh()

    if step is not None:
        quantizer.scale.mul_(r.abs().reshape(-1, *[1] * (step.dim() - 1)))
    layer.refresh()
    now = layer.quantize()
    if not torch.equal(now.values(), turned):                     # a place within a bit of a tie: the master goes to its value
        hard = quantizer.quant.grain.back(quantizer.quant.grain.view(turned) * now.steps.unsqueeze(-1), turned.shape)
        layer.weight.copy_(torch.where(now.values() == turned, layer.weight, hard))
        layer.refresh()
    if not torch.equal(layer.quantize().values(), turned):
        back()
        raise QuantError(f"{name}: folding would move codes, since the step is measured anew or rounded to {quantizer.quant.scale.dtype}. "
                         "Fold before `quantize`; nothing was folded")
    return back


def _why_not_quantized(layer: Any, r: Tensor) -> str | None:
    if layer.weight_quantizer is None:
        return None
    if layer.transform is not None or layer.adapter is not None or not isinstance(layer.weight_quantizer, Quantizer):
        return "its weight has a transform, an adapter, or parts with numbers of their own"
    quant = layer.weight_quantizer.quant
    if quant.grain != PerChannel() and not isinstance(quant.grain, Group):
        return f"{quant.grain} has one step for several channels, and the norm has a factor for each; take PerChannel()"
    if layer.weight_quantizer.zero is not None or layer.weight_quantizer.offset is not None or layer.quantize().offset is not None:
        return "its values have a zero or an offset of their own"
    if bool((r == 0).any()):
        return f"gamma of channel {int((r == 0).nonzero()[0])} is 0, and no step is"
    if bool((r < 0).any()) and quant.grid.low != -quant.grid.high:
        return (f"gamma of {int((r < 0).sum())} channels is negative, which turns the sign of their weights, and {quant.grid} has {quant.grid.low:g} "
                f"and no {-quant.grid.low:g}. A narrow grid has both signs of all: Uniform({quant.bits}, narrow=True)")
    return None


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in model.modules():
        for child, part in parent._modules.items():
            if part is old:
                parent._modules[child] = new


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
