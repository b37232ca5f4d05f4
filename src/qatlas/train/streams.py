"""Streams: what goes from block to block while a model is worked on one block at a time.

    walk = Walk(model, task, batches=32)       the blocks, and what enters the first one: the activations of so many batches of the task
    for i, name in enumerate(walk.names):
        walk.push(i, walk.full)                the stream goes through block i as it is now: full precision, or quantized

A *stream* is one tensor for each batch, (rows, tokens, width) or (rows, channels, height, width), in the type that the model gave it; in memory, or
one file a batch in a directory. `full` is what enters a block of the full-precision model, `quantized` what enters it behind quantized blocks. They
are one until a quantizer has run. Nothing else of the activations is kept, so what a walk needs does not grow with the number of blocks.

What else a block is given (masks, positions) is what the model's own forward gave it. It is recorded for the first block, and again only for a block
that gets something else than an earlier one (Gemma's windows and whole attention take turns); what is equal in two batches is kept once. Caches are
not recorded: blocks run as in training. A model whose blocks do not hand on their output as it is cannot be walked, and is refused by name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.error import QuantError
from ..core.quantizer import Quantizer
from ..model.blocks import Call, blocks, record, run_block
from .evaluate import judged
from .task import Batch, Task, moved
from .teacher import full_precision


class Stream:
    """Tensors by number, one a batch; in memory (directory None), or a file each."""

    def __init__(self, directory: Path | None, name: str) -> None:
        self.directory, self.name = directory, name
        self._held: dict[int, Tensor] = {}
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, i: int) -> Tensor:
        return self._held[i] if self.directory is None else load_file(self._file(i))["hidden"]

    def __setitem__(self, i: int, hidden: Tensor) -> None:
        hidden = hidden.detach().to("cpu").contiguous()
        if self.directory is None:
            self._held[i] = hidden
            return
        aside = self._file(i).with_suffix(".part")
        save_file({"hidden": hidden}, aside)
        os.replace(aside, self._file(i))

    def close(self) -> None:
        """Forget everything."""
        self._held.clear()
        for file in self.directory.glob(f"{self.name}-*.safetensors") if self.directory is not None else ():
            file.unlink()

    def _file(self, i: int) -> Path:
        assert self.directory is not None
        return self.directory / f"{self.name}-{i:05d}.safetensors"


class Walk:
    """The blocks of a model and the streams at the door of the next one.

    names: of the blocks, in order. batches: how many batches of the task, its first. rows: how many each batch has. masks: of each batch,
    (rows, tokens), True where a position counts, or None. full, quantized: the streams. within: see `model.blocks.blocks`. directory: where streams
    lie; None is memory.

    Raises:
        QuantError: no repeated blocks, or blocks that do not stand one behind the other.
    """

    def __init__(self, model: nn.Module, task: Task, batches: int = 32, *, within: str = "", directory: Path | str | None = None) -> None:
        if batches < 1:
            raise QuantError(f"batches={batches}: what goes through the blocks is recorded on at least one batch")
        self.model, self.task, self.count = model, task, batches
        self.names = [name for name, _ in blocks(model, within)]
        _own_weights(model, self.names)
        self.device = Accelerator().device
        self.full = Stream(None if directory is None else Path(directory), "full")
        self.quantized = self.full
        self.rows: list[int] = []
        self.masks: list[Tensor | None] = []
        self._rest: dict[int, list[Call]] = {}                    # kind -> what a block of this kind is given besides the stream, by batch
        with judged(model), _uncached(model):
            self._kinds = self._look()
            self._record()

    def block(self, i: int) -> nn.Module:
        """The block, as it is now."""
        return self.model.get_submodule(self.names[i])

    def call(self, i: int, batch: int, hidden: Tensor) -> Call:
        """A call of block i: the batch's own arguments with these hidden states, (rows, ...), on their device."""
        return _on(self._rest[self._kinds[i]][batch], hidden.device).on(hidden)

    @torch.no_grad()
    def outputs(self, i: int, stream: Stream) -> Iterator[tuple[int, Tensor]]:
        """Batch by batch what block i makes of a stream, in the type of the stream."""
        block = self.block(i)
        home = next(block.parameters()).device
        try:
            with judged(block.to(self.device)):
                for k in range(self.count):
                    hidden = stream[k]
                    yield k, _first(run_block(block, self.call(i, k, hidden.to(self.device)))).to(hidden.dtype)
        finally:
            block.to(home)

    def push(self, i: int, stream: Stream) -> None:
        """The stream goes through block i, in place."""
        for k, hidden in self.outputs(i, stream):
            stream[k] = hidden

    def fork(self) -> None:
        """From here on the two streams differ: `quantized` keeps what is at the door, `full` may go on."""
        if self.quantized is self.full:
            self.quantized = Stream(self.full.directory, "quantized")
            for k in range(self.count):
                self.quantized[k] = self.full[k]

    def close(self) -> None:
        """Forget the streams."""
        self.full.close()
        self.quantized.close()

    def _look(self) -> list[int]:
        """Kind of each block: the first block that is given the same besides the stream. One forward; each block must be given what the last gave."""
        kinds: list[int] = []
        known: dict[int, Call] = {}
        before: list[Tensor] = []

        def enter(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                call = Call(args, kwargs)
                if i != len(kinds) or (before and not torch.equal(before[0], call.hidden)):
                    raise QuantError(f"{self.names[i]} of {type(self.model).__name__} is not given what {self.names[i - 1]} made: the blocks do not "
                                     "stand one behind the other, and cannot be worked on one by one. Name another list: within=...")
                rest = _rest(call)
                kind = next((k for k, other in known.items() if _alike((rest.args, rest.kwargs), (other.args, other.kwargs))), i)
                known.setdefault(kind, rest)
                kinds.append(kind)
            return hook

        def leave(module: nn.Module, args: tuple, result: Any) -> None:
            before[:] = [_first(result).detach()]

        hooks = [self.block(i).register_forward_pre_hook(enter(i), with_kwargs=True) for i in range(len(self.names))]
        hooks += [self.block(i).register_forward_hook(leave) for i in range(len(self.names))]
        try:
            with torch.no_grad(), full_precision(self.model):
                self.task.logits(self.model, self._batch(0))
        finally:
            for hook in hooks:
                hook.remove()
        if len(kinds) != len(self.names):
            raise QuantError(f"{self.names[len(kinds)]} of {type(self.model).__name__} is never called; blocks that are skipped cannot be worked on")
        return kinds

    def _record(self) -> None:
        apart = any(isinstance(m, Quantizer) for name, m in self.model.named_modules() if not name.startswith(tuple(f"{n}." for n in self.names)))
        if apart:                                                 # what stands in front of the blocks is quantized: two streams from the beginning
            self.quantized = Stream(self.full.directory, "quantized")
        for k in range(self.count):
            batch = self._batch(k)
            self.rows.append(len(next(iter(batch.values()))))
            mask = batch.get("attention_mask")
            self.masks.append(mask.bool().cpu() if mask is not None and mask.dim() == 2 else None)
            with full_precision(self.model):
                for kind in sorted(set(self._kinds)):
                    [call] = record(self.model, self.names[kind], [batch], self.task.logits, output=False)
                    if kind == 0:
                        self.full[k] = call.hidden
                    self._rest.setdefault(kind, []).append(_shared(_on(_rest(call), torch.device("cpu")), self._rest.get(kind, [])))
            if apart:
                self.quantized[k] = record(self.model, self.names[0], [batch], self.task.logits, output=False)[0].hidden

    def _batch(self, k: int) -> Batch:
        where = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        return moved({name: value for name, value in self.task.batch(k).items() if name != "labels"}, where)


def part(call: Call, rows: slice, of: int) -> Call:
    """The call for some rows of a batch of `of` rows: what has a row for each is cut."""
    def cut(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == of else value
    return Call(*_map((call.args, call.kwargs), cut))


def _own_weights(model: nn.Module, names: list[str]) -> None:
    owner: dict[int, str] = {}
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            if owner.setdefault(id(parameter), name) != name:
                raise QuantError(f"{name} and {owner[id(parameter)]} of {type(model).__name__} share a weight: it cannot be trained in one and then "
                                 "in the other. Train the model as a whole")


@contextlib.contextmanager
def _uncached(model: Any) -> Iterator[None]:
    """No key/value cache inside."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before:
        config.use_cache = False
    try:
        yield
    finally:
        if before:
            config.use_cache = before


def _rest(call: Call) -> Call:
    """All but the hidden states."""
    return call.on(torch.empty(0))


def _first(value: Any) -> Tensor:
    return Call((), {}, value).answer


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if type(value) in (tuple, list):
        return type(value)(_map(item, change) for item in value)
    if type(value) is dict:
        return {key: _map(item, change) for key, item in value.items()}
    return change(value)


def _on(call: Call, device: torch.device) -> Call:
    return Call(*_map((call.args, call.kwargs), lambda value: value.to(device) if isinstance(value, Tensor) else value))


def _alike(a: Any, b: Any) -> bool:
    """Whether two trees hold the same; what is neither tensor nor plain counts by its type (an empty cache is like another)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(value, b[key]) for key, value in a.items())
    return a == b if a is None or isinstance(a, bool | int | float | str) else True


def _shared(call: Call, before: list[Call]) -> Call:
    """The call with tensors that the first batch has too taken from it."""
    if not before:
        return call
    def same(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return b if _alike(a, b) else a
        if type(a) in (tuple, list) and type(a) is type(b) and len(a) == len(b):
            return type(a)(map(same, a, b))
        if type(a) is dict and type(b) is dict:
            return {key: same(value, b.get(key)) for key, value in a.items()}
        return a
    return Call(same(call.args, before[0].args), same(call.kwargs, before[0].kwargs))
