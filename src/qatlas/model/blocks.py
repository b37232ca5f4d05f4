"""The repeated blocks of a model, found, recorded and run one alone: what block-by-block reconstruction stands on.

A block is one of the children of the longest list whose members are alike: `model.layers` of Llama, `encoder.layer` of BERT, `h` of GPT-2. A network
of stages (ResNet) has a list of stages and a list in each; the longest is taken, and `blocks(model, within=...)` finds the others.

`record` runs the model with its own forward and keeps what went into one block and what came out of it. The run ends there: what stands behind the
block is never computed. Everything is kept by value (a layer that works in place cannot change it), with the keyword arguments of the moment: masks,
position embeddings, caches are what the model made of them. `run_block` then gives the same output, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.error import QatlasError, QuantError, unknown


@dataclass
class Call:
    """One call of a block: args and kwargs as they came, output as it left (None where it was not asked for)."""

    args: tuple
    kwargs: dict[str, Any]
    output: Any = None

    @property
    def hidden(self) -> Tensor:
        """The first tensor of the input: the hidden states, (batch, tokens, width) or (batch, channels, height, width)."""
        return _first((self.args, self.kwargs))

    @property
    def answer(self) -> Tensor:
        """The first tensor of the output."""
        return _first(self.output)

    def on(self, hidden: Tensor) -> Call:
        """The same call with other hidden states: those that quantized earlier blocks gave."""
        args, kwargs, done = list(self.args), dict(self.kwargs), False
        for i, value in enumerate(args):
            if isinstance(value, Tensor) and not done:
                args[i], done = hidden, True
        for key, value in kwargs.items():
            if isinstance(value, Tensor) and not done:
                kwargs[key], done = hidden, True
        return Call(tuple(args), kwargs, self.output)


def blocks(model: nn.Module, within: str = "") -> list[tuple[str, nn.Module]]:
    """Names and modules of the longest ModuleList or Sequential whose children are of one class and have parameters; the first of equals.

    within: look only below this module.

    Raises:
        QuantError: no list of two or more; the message names the lists that there are.

    >>> [name for name, _ in blocks(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)), nn.ReLU()))]
    ['0.0', '0.1', '0.2']
    """
    best: tuple[str, list[tuple[str, nn.Module]]] = ("", [])
    seen = []
    for name, module in model.get_submodule(within).named_modules(prefix=within):
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        children = [(f"{name}.{key}".lstrip("."), child) for key, child in module.named_children()]
        alike = len({type(child) for _, child in children}) == 1 and all(any(True for _ in child.parameters()) for _, child in children)
        classes = ", ".join(sorted({type(child).__name__ for _, child in children}))
        seen.append(f"{name or 'the model itself'} ({len(children)} of {classes or 'nothing'})")
        if alike and len(children) > len(best[1]):
            best = (name, children)
    if len(best[1]) < 2:
        there = "; ".join(seen[:8]) or "no ModuleList and no Sequential"
        where = type(model).__name__ + (f" below {within}" if within else "")
        raise QuantError(f"{where} has no repeated blocks: no list of two or more modules of one class with parameters. "
                         f"Found: {there}. Name the blocks yourself, or reconstruct layer by layer")
    return best[1]


class _Enough(Exception):
    """Ends a forward that has given what was wanted; never leaves this file."""


def record(model: nn.Module, block: str, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None, *,
           output: bool = True) -> list[Call]:
    """The calls of one block, one for each batch, in the mode in which the model is, without gradients.

    block: its name, as `blocks` gives it.
    forward: (model, batch) -> anything; by default model(**batch) for a mapping, model(*batch) for a tuple or list, else model(batch).
    output: False stops before the block runs and keeps the inputs only.

    Raises:
        QuantError: no such module, or a batch whose forward never calls it.
    """
    names = dict(model.named_modules(remove_duplicate=False))
    if block not in names:
        raise QuantError(unknown("module", block, [name for name, _ in _candidates(model)] or names))
    calls: list[Call] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append(Call(_kept(args), _kept(kwargs)))
        if not output:
            raise _Enough

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        calls[-1].output = _kept(result)
        raise _Enough

    hooks = [names[block].register_forward_pre_hook(before, with_kwargs=True)]
    if output:
        hooks.append(names[block].register_forward_hook(after, with_kwargs=True))
    try:
        for batch in batches:
            count = len(calls)
            try:
                with torch.no_grad():
                    (forward or _call)(model, batch)
            except _Enough:
                pass
            if len(calls) == count:
                raise QuantError(f"the forward of batch {count} never called {block!r}: it is skipped in this mode, or stands in an unused branch")
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def run_block(block: nn.Module, call: Call) -> Any:
    """The block's output on a recorded call, with gradients where they are on. The call stays as it is, its caches included."""
    return block(*_kept(call.args, clone=False), **_kept(call.kwargs, clone=False))


def _call(model: nn.Module, batch: Any) -> Any:
    if hasattr(batch, "keys"):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    try:
        return blocks(model)
    except QatlasError:
        return []


def _kept(value: Any, clone: bool = True) -> Any:
    """The value as it is now: tensors cloned, containers rebuilt, other objects (key/value caches) copied."""
    if isinstance(value, Tensor):
        return value.detach().clone() if clone else value
    if isinstance(value, dict) and type(value) is dict:
        return {key: _kept(item, clone) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_kept(item, clone) for item in value)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device | nn.Module) or callable(value):
        return value
    return copy.deepcopy(value)


def _first(value: Any) -> Tensor:
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else [value]:
        if isinstance(item, Tensor):
            return item
        if isinstance(item, dict | tuple | list) and item:
            with_tensor = [part for part in (item.values() if isinstance(item, dict) else item) if isinstance(part, Tensor)]
            if with_tensor:
                return with_tensor[0]
    raise QuantError(f"a call without a tensor: {type(value).__name__}")
