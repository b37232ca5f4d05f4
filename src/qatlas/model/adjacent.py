"""Adjacent: which batch norm stands right behind which layer, in a probe forward and not by name.

The tensor that goes into the norm must be the very tensor that the layer gave, the same object, untouched since (a ReLU in place gives the same
object in another version). Both are called once, the layer feeds no other norm, and its weight is its own. That nothing else hears the layer's output
the hooks cannot see; fold.py proves that by the model's output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.error import QuantError
from ..core.quantizer import Quantizer
from ..layers.packed import Packed
from .probe import output
from .signals import matches

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
SHOWN = 4                                                         # reasons that an error lists


@torch.no_grad()
def adjacent(model: nn.Module, batch: Any, names: str = "*") -> dict[str, str]:
    """Norm -> the layer whose output it normalises, in a probe forward.

    Raises:
        QuantError: no norm of these names; one that does not stand right behind a layer, by name.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and matches(names, name, set())}
    if not norms:
        there = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        raise QuantError(f"{type(model).__name__} has no batch norm {names!r}; " + (f"it has {', '.join(there[:SHOWN])}" if there else "it has none"))
    calls, came, last = _traced(model, batch, norms)
    users = Counter(source for source in came.values() if source is not None)
    owners = Counter(id(m._parameters.get("weight")) for m in model.modules() if m._parameters.get("weight") is not None)
    pairs, faults = {}, {}
    for name, norm in norms.items():
        source = came.get(name)
        why = _why_not(norm, calls[name], source, None if source is None else model.get_submodule(source), last.get(name), calls, users, owners)
        if why is None and source is not None:
            pairs[name] = source
        else:
            faults[name] = why
    if faults:
        more = [f"\n  {name}: {why}" for name, why in list(faults.items())[:SHOWN]]
        raise QuantError(f"{len(faults)} of {len(norms)} batch norms cannot be folded; leave them out by names=..., or take a model without:"
                         + "".join(more) + ("\n  ..." if len(faults) > SHOWN else ""))
    return pairs


def _why_not(norm: Any, calls: int, source: str | None, layer: Any, dim: int | None, count: Counter, users: Counter, owners: Counter) -> str | None:
    """Why a norm cannot be folded into the module that gave its input, or None."""
    if calls != 1:
        return f"it serves {calls} places, and its numbers fit one layer" if calls else "the probe forward never called it"
    if not isinstance(norm, NORMS):
        return f"a {type(norm).__name__} is not known here; a BatchNorm1d or BatchNorm2d is"
    if norm.running_mean is None:
        return "it has no running statistics and normalises by the batch that it sees"
    if source is None:
        return "its input is no module's output as it came: something was computed in between"
    if isinstance(layer, Quantizer):
        return f"a quantizer stands between: {source}"
    if isinstance(layer, Packed):
        return f"{source} is packed, its codes are what they are; fold before packing"
    if not isinstance(layer, LAYERS) or "weight" not in layer._parameters:
        return f"its input comes from {source} ({type(layer).__name__}), which is no convolution and no linear layer with a weight of its own"
    if count[source] != 1 or users[source] != 1 or owners[id(layer.weight)] != 1:
        return f"{source} gives its output, or its weight, to more than this norm"
    if isinstance(layer, nn.Linear) and dim != 2:
        return f"it normalises axis 1 of what {source} gives, and the outputs of a linear layer are the last axis of {dim}"
    return None


def _traced(model: nn.Module, batch: Any, norms: Mapping[str, nn.Module]) -> tuple[Counter, dict[str, str | None], dict[str, int]]:
    """Calls of each module; norm -> the module that made its input, if nobody has written into it since; norm -> axes of its input."""
    calls: Counter = Counter()
    made: dict[int, tuple[Tensor, int, str]] = {}                 # the tensors stay alive, so that no id comes back
    came: dict[str, str | None] = {}
    axes: dict[str, int] = {}

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple) -> None:
            if name in norms and args:
                tensor, version, source = made.get(id(args[0]), (None, -1, None))
                came[name], axes[name] = (source if tensor is not None and tensor._version == version else None), args[0].dim()
        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, out: Any) -> None:
            calls[name] += 1
            if isinstance(out, Tensor):
                made.setdefault(id(out), (out, out._version, name))      # the innermost module is the first to leave
        return hook

    hooks = [hook for name, module in model.named_modules() if name
             for hook in (module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave(name)))]
    try:
        output(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, came, axes
