"""Taps: read, replace and cut off signals of a running model, by address (see signals.py for what an address can say).

    with read(teacher, ["*.self_attn:probabilities", "model.layers.*:output"]) as signals:
        teacher(**batch)
    with override(student, {a: x for a, x in signals.items() if a.endswith(":probabilities")}), stop_gradient(student, "*.self_attn:query_input"):
        loss(student(**batch)).backward()

`read` gives address -> tensor, on the graph, as the model computed it: before an override of the same signal, whichever was opened first. It holds
one forward; the next one of the same model starts it afresh. `override` takes tensors, or functions of what the model computed; the shape stays.
`stop_gradient` lets the value pass and no gradient. Taps at one signal act in this order: read, override, stop.

Works by hooks for inputs and outputs, and by our attention function for what lies inside; a model is switched to it only while such a tap is open.
Outside of the contexts there are no hooks, and the model has the attention that it had.

Gradient checkpointing of the non-reentrant kind runs parts of the forward a second time, during backward. Values are read in the first; overrides and
stops act alike in both, so a function given to `override` must be pure. The backward may come after the context has closed: its taps then wait, for
recomputation only, until the model's next forward. (A backward that came later still would be computed without them: keep it before that forward.)
The reentrant kind computes without a graph what a tap would read, and is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.error import QuantError, RuleError
from ..layers.attention import INSIDE, TAPS, recomputing, through
from . import signals
from .signals import Spot

READ, OVERRIDE, STOP = range(3)                                   # the order of taps at one signal


@dataclass(eq=False)
class Tap:
    """One act at one signal."""

    address: str
    order: int
    act: Callable[[Tensor], Tensor]
    closed: bool = False
    calls: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        again = recomputing()
        if (self.closed and not again) or (self.order == READ and again):
            return x
        self.calls += 1
        return self.act(x)


@dataclass(eq=False)
class Session:
    """The taps of one context, put in and taken out together."""

    model: nn.Module
    taps: list[tuple[Spot, Tap]] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)
    graph: bool = False                                           # whether a forward with gradients was seen

    def open(self) -> None:
        _refuse_reentrant(self.model)
        if any(spot.signal in INSIDE for spot, _ in self.taps):
            self.undo.append(signals.hold(self.model))
        for spot, tap in self.taps:
            at = spot.module.__dict__.setdefault(TAPS, {})
            if not at.get(spot.signal) and spot.signal in ("input", "output"):
                at["hooks", spot.signal] = _hook(spot.module, spot.signal)
            at.setdefault(spot.signal, []).append(tap)
            at[spot.signal].sort(key=lambda one: one.order)
        self.undo.append(self._remove)
        self.undo.append(self.model.register_forward_pre_hook(self._seen).remove)

    def _seen(self, *_: Any) -> None:
        self.graph |= torch.is_grad_enabled()

    def _remove(self) -> None:
        for spot, tap in self.taps:
            at = spot.module.__dict__[TAPS]
            at[spot.signal].remove(tap)
            if not at[spot.signal]:
                del at[spot.signal]
                if ("hooks", spot.signal) in at:
                    at.pop(("hooks", spot.signal)).remove()
            if not at:
                del spot.module.__dict__[TAPS]

    def close(self) -> None:
        """Take the taps out; where a backward may still recompute, only once the next forward begins."""
        waits = self.graph and any(getattr(m, "gradient_checkpointing", False) and m.training for m in self.model.modules())
        if not waits:
            return self._end()
        for _, tap in self.taps:
            tap.closed = True
        self.undo.pop()()                                         # `_seen` has done its work
        handle = self.model.register_forward_pre_hook(lambda *_: None if recomputing() else self._end(), prepend=True)
        self.undo.append(handle.remove)

    def _end(self) -> None:
        while self.undo:
            self.undo.pop()()


def _refuse_reentrant(model: nn.Module) -> None:
    for name, module in model.named_modules():
        how = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and isinstance(how, partial) and how.keywords.get("use_reentrant"):
            raise RuleError(f"{name or type(model).__name__} uses reentrant gradient checkpointing, which has no graph for what a tap reads; call "
                            'model.gradient_checkpointing_enable({"use_reentrant": False})')


def _hook(module: nn.Module, signal: str) -> Any:
    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        place = next((i for i, x in enumerate(args) if isinstance(x, Tensor)), None)
        if place is not None:
            return (*args[:place], through(module, "input", args[place]), *args[place + 1:]), kwargs
        name = next((name for name, x in kwargs.items() if isinstance(x, Tensor)), None)
        if name is None:
            raise QuantError(f"a {type(module).__name__} was called without a tensor; it has no input to tap")
        return args, kwargs | {name: through(module, "input", kwargs[name])}

    def after(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, Tensor):
            return through(module, "output", output)
        if isinstance(output, dict):                              # a ModelOutput
            name = next(key for key, x in output.items() if isinstance(x, Tensor))
            return type(output)(**{**output, name: through(module, "output", output[name])})
        if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
            return type(output)((through(module, "output", output[0]), *output[1:]))
        raise QuantError(f"a {type(module).__name__} gave no tensor but {type(output).__name__}; it has no output to tap")

    return module.register_forward_pre_hook(before, with_kwargs=True) if signal == "input" else module.register_forward_hook(after)


@contextlib.contextmanager
def _opened(model: nn.Module, patterns: Mapping[str, list[tuple[Spot, Tap]]]) -> Iterator[Session]:
    session = Session(model, [pair for pairs in patterns.values() for pair in pairs])
    session.open()
    try:
        yield session
    except BaseException:
        session._end()
        raise
    session.close()
    for pattern, pairs in patterns.items():
        if pairs and not any(tap.calls for _, tap in pairs):
            session._end()
            raise QuantError(f"{pattern!r}: nothing passed there while it was open ({pairs[0][0].at or type(model).__name__} was not called); run "
                             "the model inside the context, and see that this mode calls the module")


@contextlib.contextmanager
def read(model: nn.Module, addresses: str | Iterable[str], every: bool = False) -> Iterator[dict[str, Any]]:
    """Address -> tensor of one forward inside the context, filled while it runs, on the graph.

    addresses: one or more. every: a list of tensors for each address, one for each call (layers that are called many times in one forward).

    Raises:
        RuleError: an address that reaches nothing; see `signals.find`.
        QuantError: a module that was called twice in one forward (without `every`), or never.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with read(model, "0:output") as signals:
    ...     y = model(torch.ones(1, 2))
    >>> {address: tuple(x.shape) for address, x in signals.items()}
    {'0:output': (1, 3)}
    """
    found: dict[str, Any] = {}

    def keep(address: str) -> Callable[[Tensor], Tensor]:
        def act(x: Tensor) -> Tensor:
            if every:
                found.setdefault(address, []).append(x)
            elif address in found:
                raise QuantError(f"{address} passed twice in one forward (a shared layer, or a block run by itself); read(..., every=True) gives a "
                                 "list of all")
            else:
                found[address] = x
            return x
        return act

    survey = signals.Survey.of(model)
    spots = {address: signals.find(model, address, survey) for address in _list(addresses)}
    seen: set[str] = set()
    patterns: dict[str, list[tuple[Spot, Tap]]] = {}
    for pattern, many in spots.items():                            # two globs may mean the same signal: it is read once
        patterns[pattern] = [(spot, Tap(spot.address, READ, keep(spot.address))) for spot in many if spot.address not in seen]
        seen |= {spot.address for spot in many}
    with _opened(model, patterns):
        fresh = model.register_forward_pre_hook(lambda *_: None if recomputing() else found.clear(), prepend=True)
        try:
            yield found
        finally:
            fresh.remove()


@contextlib.contextmanager
def override(model: nn.Module, what: Mapping[str, Tensor | Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside, the signals at these addresses are what is given: a tensor, or a function of what the model computed. What `read` gave can be given.

    A tensor keeps its own graph (detach it where it should have none) and takes the type and device of what it replaces.

    Raises:
        RuleError: an address that reaches nothing, or two that reach the same signal.
        QuantError: another shape than the model's, or a module that is never called.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with override(model, {"0:output": lambda x: torch.full_like(x, 7.0)}):
    ...     model(torch.ones(1, 2))
    tensor([[7., 7., 7.]])
    """
    owner: dict[str, str] = {}
    patterns: dict[str, list[tuple[Spot, Tap]]] = {}
    survey = signals.Survey.of(model)
    for pattern, value in what.items():
        patterns[pattern] = []
        for spot in signals.find(model, pattern, survey):
            place = f"{spot.at}:{spot.signal}"
            if place in owner:
                raise RuleError(f"{pattern!r} and {owner[place]!r} both override {spot.address}; name it once")
            owner[place] = pattern
            patterns[pattern].append((spot, Tap(spot.address, OVERRIDE, partial(_replace, spot.address, value))))
    with _opened(model, patterns):
        yield


def _replace(address: str, value: Any, x: Tensor) -> Tensor:
    new = value if isinstance(value, Tensor) else value(x)
    if not isinstance(new, Tensor) or new.shape != x.shape:
        found = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise QuantError(f"{address} is {tuple(x.shape)} in this model and is overridden by {found}: the same batch, length, heads and width are "
                         "needed on both sides")
    return new.to(x.device, x.dtype)


@contextlib.contextmanager
def stop_gradient(model: nn.Module, addresses: str | Iterable[str]) -> Iterator[None]:
    """Inside, no gradient flows back through these signals; values are as ever.

    "*:query_input" and its like stop it at one projection and not at the others.

    Raises:
        RuleError: an address that reaches nothing; query_input where query, key and value are made by one matrix.
        QuantError: a module that is never called.
    """
    survey = signals.Survey.of(model)
    spots = {address: signals.find(model, address, survey) for address in _list(addresses)}
    with _opened(model, {address: [(spot, Tap(spot.address, STOP, Tensor.detach)) for spot in many] for address, many in spots.items()}):
        yield


def _list(addresses: str | Iterable[str]) -> list[str]:
    return [addresses] if isinstance(addresses, str) else list(addresses)
