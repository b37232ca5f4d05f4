"""Probe: look at a model while it runs, and leave it as it was.

`undisturbed` restores buffers (batch norm's running statistics), the train/eval mode of every module and the random state, so that a probe forward
can be run anywhere without changing what comes after it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.error import FormatError, QuantError
from ..core.quantizer import Quantizer

TEXT = ("input_ids", "attention_mask", "token_type_ids")


def forward(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: keywords of a dict, or one positional input. A dict of one input goes by position where the model calls it otherwise.

    >>> forward(nn.Sequential(nn.Linear(2, 3)), {"pixel_values": torch.zeros(1, 2)}).shape
    torch.Size([1, 3])
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, dict):
        takes = inspect.signature(model.forward).parameters
        if len(batch) == 1 and not takes.keys() & batch.keys() and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            return model(next(iter(batch.values())).to(device))
        return model(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()})
    return model(batch.to(device))


def images(model: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a transformers model sees, as its config says; 32 x 32 where any size passes."""
    size = getattr(model.config, "image_size", 32)
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(model.config, "num_channels", 3), height, width


def inputs(model: Any) -> dict[str, Tensor]:
    """Two rows of what a transformers model takes, by name.

    Raises:
        FormatError: a module that does not say what it takes.
    """
    takes = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", None)
    if not hasattr(model, "config") or main not in ("input_ids", "pixel_values"):
        raise FormatError(f"{type(model).__name__} does not say what its inputs are; give two rows of them as `batch`, by name")
    if main == "pixel_values":
        channels, height, width = images(model)
        return {main: torch.zeros(2, channels, height, width if sized(model) else 2 * width)}      # equal sides would be taken for a law
    ids = torch.arange(16).view(2, 8) % model.config.vocab_size
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    typed = getattr(model.config, "type_vocab_size", 0)           # GPT-2 looks token types up among its words: type 0 is not "no type" there
    return {name: values[name] for name in TEXT if name in takes and (typed or name != "token_type_ids")}


def sized(model: Any) -> bool:
    """Whether the model sees images of one size only."""
    return getattr(getattr(model, "config", None), "image_size", None) is not None


def drawn(model: Any) -> dict[str, Tensor]:
    """The same with random pixels, since zeros hide much."""
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(x.shape, generator=draw) if x.is_floating_point() else x for name, x in inputs(model).items()}


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, forwards may change buffers, modes and random numbers; outside nothing has happened."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = [(module, module.training) for module in model.modules()]
    cards = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cards):
        try:
            yield
        finally:
            for name, buffer in model.named_buffers():
                if name in kept:
                    buffer.copy_(kept[name])
            for module, mode in modes:
                module.training = mode


@torch.no_grad()
def output(model: nn.Module, batch: Any) -> Tensor:
    """The logits, or the first thing that a model gives, in double precision; in eval mode, all quantizers off."""
    on = [module for module in model.modules() if isinstance(module, Quantizer) and module.on]
    for quantizer in on:
        quantizer.on = False
    try:
        with undisturbed(model):
            model.eval()
            out = forward(model, batch)
    finally:
        for quantizer in on:
            quantizer.on = True
    out = out if isinstance(out, Tensor) else out.logits if hasattr(out, "logits") else out[0]
    return out.detach().double()


@torch.no_grad()
def peaks(model: nn.Module, batches: Iterable[Any], names: Iterable[str]) -> dict[str, Tensor]:
    """max|x| of each input channel of the named layers, over some batches: name -> (in,).

    Raises:
        QuantError: a layer that was never called.
    """
    names = list(names)
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            peak = args[0].detach().abs().flatten(0, -2).amax(0)
            found[name] = torch.maximum(found[name], peak) if name in found else peak
        return hook

    with undisturbed(model):
        model.eval()
        hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
        try:
            for batch in batches:
                forward(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
    missing = [name for name in names if name not in found]
    if missing:
        raise QuantError(f"{missing[0]} was never called on the calibration batches; its transform needs max|x| of its input")
    return found
