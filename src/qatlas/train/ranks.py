"""Ranks: one training on several processes, with the numbers of one.

`accelerate launch` or torchrun starts the same script once a process; `fit` sees how many there are. The global batch is the same for any number of
them (see fit), so the losses are those of one process up to the order of sums.

    DDP      every process holds the whole model; gradients are averaged. The default.
    FSDP2    masters, gradients and moments are cut along their first dimension, one piece a process, while the steps run. A block's parameters are
             gathered before its forward and before its backward, so a quantizer always sees whole rows and whole tensors.

FSDP2 is asked for as Accelerate does it, and on CPU (gloo), where Accelerate itself would take DDP, by the same names in the environment:

    accelerate launch --use_fsdp --fsdp_version 2 --fsdp_cpu_ram_efficient_loading false script.py
    ACCELERATE_USE_CPU=true ACCELERATE_USE_FSDP=true FSDP_VERSION=2 torchrun --nproc-per-node 2 script.py

`shared` cuts the model before the optimizer exists and puts it together after the last step: the same Parameter objects, the same classes, no hook
left. Before and after `fit` the model is therefore an ordinary one, whole and equal on every process: judge it on all of them, save it on one. It
must fit one device whole at the beginning and at the end; what FSDP2 saves are gradients, moments and, between, masters. Between steps a weight is a
piece: `whole` and `opened` put one together, on all processes at once, and `cut` takes the piece of a whole.

What FSDP2 is not given here is refused by name: version 1, offloading, statistics that move with the rows that one process sees (batch norm, moving
scales of activations; DDP takes the first process's), tactics that have not said that they can (`Tactic.pieces`), parameters shared by two blocks, a
loss that reads the inside of a block and not the output. A weight that is kept as a buffer would be a whole copy on every process: it is recomputed
instead, and a line says so. `keep="each"` stays what it is, but saves every quantized weight whole until the backward: take "recompute" for memory.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn

from ..core.error import QatlasError, QuantError, RunError
from ..core.quantizer import Quantizer
from ..layers.quantized import Quantized
from ..model.blocks import blocks

if TYPE_CHECKING:
    from .tactic import Tactic

HOME = "torch.distributed.fsdp"


@contextlib.contextmanager
def shared(accelerator: Accelerator, model: nn.Module, tactics: Sequence[Tactic]) -> Iterator[nn.Module]:
    """What to call for a forward: the model itself, or one that does its part of the work. Under FSDP2 the model is in pieces inside.

    Raises:
        RunError: what cannot work under FSDP2, by name; the model is then as it was. Several processes that do not know of each other.
    """
    if accelerator.num_processes == 1:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RunError(f"this is one of {os.environ['WORLD_SIZE']} processes, and Accelerate sees one: each would train for itself. "
                           "Without a GPU set ACCELERATE_USE_CPU=true")
        yield model
        return
    if not asked(accelerator):
        with _silent(model):
            yield accelerator.prepare_model(model)
        return
    units = _units(model)
    check(model, units, tactics)
    kept = [layer for layer in model.modules() if isinstance(layer, Quantized) and layer.keep == "buffer"]
    if kept and accelerator.is_main_process:
        warnings.warn(f"FSDP2 recomputes: {len(kept)} weights that would be kept as buffers are recomputed while it runs", stacklevel=4)
    for layer in kept:
        layer.keep = "recompute"
    pieces, together = Pieces(accelerator, model, units), True
    try:
        yield model
    except QatlasError:
        raise
    except BaseException as error:                                # perhaps on this process alone: gathering would wait for the others for ever
        together = False
        error.add_note("The model was cut over several processes (FSDP2) and is left in pieces.")
        raise
    finally:
        if together:
            pieces.join()
            for layer in kept:
                layer.keep = "buffer"


@contextlib.contextmanager
def _silent(model: nn.Module) -> Iterator[None]:
    """Inside, DDP leaves frozen stores alone: they are buffers, which it would send round in every forward, and never change."""
    stores = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Quantized) and m.slots.frozen is not None]
    if not stores:
        yield
        return
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, stores)
    try:
        yield
    finally:
        del model._ddp_params_and_buffers_to_ignore


def asked(accelerator: Accelerator) -> bool:
    """Whether FSDP2 is asked for.

    Raises:
        RunError: FSDP with a setting that is not taken here.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        plugin = FullyShardedDataParallelPlugin()                 # on CPU Accelerate reads it and leaves it
    if plugin is None:
        return False
    offload = plugin.cpu_offload
    wrong = {
        f"version {plugin.fsdp_version} (write --fsdp_version 2, or FSDP_VERSION=2)": plugin.fsdp_version != 2,
        "offloading to the CPU": bool(getattr(offload, "offload_params", offload is True or type(offload).__name__ == "CPUOffloadPolicy")),
        "reshard_after_forward false (a stale weight would be seen between steps)": plugin.fsdp_version == 2 and not plugin.reshard_after_forward,
        "a mixed precision of its own (Run(precision=...) says it)": plugin.mixed_precision_policy is not None,
        "weights loaded on the first process only (write --fsdp_cpu_ram_efficient_loading false)": bool(plugin.cpu_ram_efficient_loading),
        "activation checkpointing (ask the model for it)": bool(plugin.activation_checkpointing),
        "modules to ignore": bool(plugin.ignored_modules),
        "classes to wrap (the repeated blocks are found)": bool(plugin.transformer_cls_names_to_wrap),
    }
    found = [name for name, so in wrong.items() if so]
    if found:
        raise RunError(f"FSDP is asked for with {'; '.join(found)}: not taken here. Leave it out, or start without FSDP (DDP)")
    return True


def check(model: nn.Module, units: Sequence[tuple[str, nn.Module]], tactics: Sequence[Tactic]) -> None:
    """Raise RunError where a model or a tactic cannot be trained in pieces."""
    weights = {id(m.weight_quantizer) for m in model.modules() if isinstance(m, Quantized)}
    wrong = [f"{name} (statistics of the rows that one process sees)" for name, m in model.named_modules()
             if isinstance(m, nn.modules.batchnorm._BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]
    wrong += [f"{name} (a moving scale of activations)" for name, m in model.named_modules()
              if isinstance(m, Quantizer) and id(m) not in weights and m.quant.scale.keeps == "buffer"]
    wrong += [f"{name} (a parameter without a dimension)" for name, p in model.named_parameters() if p.dim() == 0]
    wrong += [f"{name} (not contiguous in memory)" for name, p in model.named_parameters() if not p.is_contiguous()]
    owner: dict[int, str] = {}
    for unit, module in units:
        for name, p in _own(module, units):
            if owner.setdefault(id(p), unit) != unit:
                wrong.append(f"{name} (shared by {owner[id(p)] or 'the model'} and {unit or 'the model'})")
    wrong += [f"the tactic {type(t).__name__} (it has not said pieces = True)" for t in tactics if not t.pieces]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise RunError(f"FSDP2 cannot train {'; '.join(wrong[:5])}{more}. Start without FSDP: DDP trains it")


def _units(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What is gathered at once: each repeated block, then the rest."""
    try:
        found = blocks(model)
    except QuantError:
        found = []
    return [*found, ("", model)]


def _own(module: nn.Module, units: Sequence[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a unit that are not inside a smaller one."""
    inner = {id(m) for _, unit in units if unit is not module for m in unit.modules()} if module is units[-1][1] else set()
    for prefix, m in module.named_modules():
        if id(m) not in inner:
            for name, p in m.named_parameters(recurse=False):
                yield f"{prefix}.{name}".lstrip("."), p


class Pieces:
    """A model cut by FSDP2, and what is needed to put it together as it was."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, units: Sequence[tuple[str, nn.Module]]) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        for t in [*model.parameters(), *model.buffers()]:         # as DDP does it: all start from the first process's numbers
            t.data = t.data.contiguous()
            dist.broadcast(t.data, 0)
        self.model = model
        self.before = [(m, type(m), set(vars(m))) for m in model.modules()]
        self.places = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None]
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for _, unit in units:
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        self.added = [set(vars(m)) - names for m, _, names in self.before]
        self.cut: dict[int, Any] = {id(p): m._parameters[name] for m, name, p in self.places}
        owners = {id(m) for m, _, _ in self.places}
        self.guards = [m.register_forward_hook(guard(name)) for name, m in model.named_modules() if id(m) in owners]
        for _, _, p in self.places:
            p.data = p.data.new_empty(0)                          # the piece is a copy

    def join(self) -> None:
        """The model as it was, with the numbers of now. On all processes at once. torch has no public way back: what it left is taken out here."""
        from torch.distributed._composable_state import _module_state_mapping as known

        for handle in self.guards:
            handle.remove()
        for p in {id(p): p for _, _, p in self.places}.values():
            p.data = whole(self.cut[id(p)]).detach()
        for module, name, p in self.places:
            module._parameters[name] = p
        for (module, kind, _), added in zip(self.before, self.added, strict=True):
            module.__class__ = kind
            known.pop(module, None)
            for name in added:
                vars(module).pop(name, None)
            tables = {name: table for name, table in vars(module).items() if "_hooks" in name and isinstance(table, dict)}
            gone = {key for table in tables.values() for key, hook in table.items() if str(getattr(hook, "__module__", "")).startswith(HOME)}
            for table in tables.values():
                for key in gone & set(table):
                    del table[key]


def guard(name: str) -> Any:
    """A forward hook of a module with parameters: raises where a gradient reaches it while they are in pieces, which torch would read as freed
    memory. A block's parameters are gathered when a gradient passes its output; a loss may read what is inside, but not only that."""
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        def see(grads: Any) -> None:
            if any(hasattr(p, "full_tensor") for p in module._parameters.values()):
                raise RunError(f"the loss reaches {name or 'the model'} without passing the output of its block, and FSDP2 gathers weights there. "
                               "Give the model's output a part in the loss, or start without FSDP: DDP trains it")

        if isinstance(output, Tensor) and output.grad_fn is not None:
            output.grad_fn.register_prehook(see)                  # behind the tensor's own hooks: FSDP gathers in one of them

    return hook


@contextlib.contextmanager
def unsynced(accelerator: Accelerator, wrapped: Any, on: bool) -> Iterator[None]:
    """Where `on`, a backward inside leaves its gradients on this process: another micro-batch of the step follows."""
    if not on or accelerator.num_processes == 1:
        yield
    elif hasattr(wrapped, "set_requires_gradient_sync"):
        wrapped.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            wrapped.set_requires_gradient_sync(True)
    else:
        with accelerator.no_sync(wrapped):
            yield


def whole(t: Any) -> Tensor:
    """A tensor that may be in pieces, whole on every process.

    >>> import torch
    >>> whole(torch.ones(1))
    tensor([1.])
    """
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def written(t: Any) -> Tensor:
    """As `whole`, for a file: in the first process's memory, and empty elsewhere."""
    if not hasattr(t, "full_tensor"):
        return t
    full = t.full_tensor()
    return full.cpu() if dist.get_rank() == 0 else full.new_empty(0, device="cpu")


def cut(value: Tensor, like: Any) -> Tensor:
    """A whole tensor that every process has, cut as `like` is.

    >>> import torch
    >>> cut(torch.ones(1), torch.zeros(1))
    tensor([1.])
    """
    if not hasattr(like, "full_tensor") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def opened(module: nn.Module) -> Iterator[None]:
    """Inside, the module's parameters are whole: for what looks at weights between steps. On all processes at once; what is written is lost."""
    places = [(m, name, p) for m in module.modules() for name, p in m._parameters.items() if p is not None and hasattr(p, "full_tensor")]
    full = {id(p): nn.Parameter(whole(p.detach()), p.requires_grad) for _, _, p in places}
    try:
        for m, name, p in places:
            m._parameters[name] = full[id(p)]
        yield
    finally:
        for m, name, p in places:
            m._parameters[name] = p
