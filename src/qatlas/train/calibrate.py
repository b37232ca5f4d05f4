"""Calibration: the quantizers of activations see some batches, then decide their signedness and the start of their scales.

While they observe, they let everything pass; quantizers that need nothing (weights, dynamic scales) work as ever. Ranks share the batches, and each
quantizer is initialised from what all ranks saw, so all ranks start alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.error import QuantError
from ..core.grid import Uniform
from ..core.quantizer import Quantizer
from .evaluate import judged

if TYPE_CHECKING:
    from .task import Task


def pending(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers that cannot work yet: no scale, or a signedness that is still open."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, Quantizer)}
    return {name: q for name, q in found.items() if not q.ready or (isinstance(q.quant.grid, Uniform) and q.quant.grid.signed is None)}


def calibrate(model: nn.Module, task: Task, n: int = 8) -> int:
    """Initialise every pending quantizer on the task's first n batches; their number.

    Raises:
        QuantError: quantizers that were never called, by name.
    """
    waiting = pending(model)
    if not waiting:
        return 0
    batches = task.calibration(n)
    shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() <= len(batches)
    if shared:
        batches = batches[dist.get_rank() :: dist.get_world_size()]
    where = next((p.device for p in model.parameters()), torch.device("cpu"))
    for quantizer in waiting.values():
        quantizer.observe()
    try:
        with judged(model):
            for batch in batches:
                task.logits(model, {name: value.to(where) for name, value in batch.items()})
    finally:
        unseen = [name for name, quantizer in waiting.items() if not settled(quantizer, gather if shared else None, where)]
    if unseen:
        raise QuantError(f"{len(unseen)} of {len(waiting)} quantizers saw no input on {n} calibration batches: {', '.join(unseen[:8])}{' ...' if unseen[8:] else ''}. "
                         "Their layers were never called; keep them in full precision, or give batches that reach them")
    return len(waiting)


def settled(quantizer: Quantizer, share: object, where: torch.device) -> bool:
    """End the observation; whether there was any."""
    if not quantizer.observed:
        quantizer.forget()
        return False
    quantizer.settle(share)
    quantizer.to(where)
    return True


def gather(seen: Tensor) -> Tensor:
    """(groups, n) on each rank -> (groups, sum of all n), the same on every rank."""
    where = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    mine = torch.tensor([seen.shape[-1]], device=where)
    sizes = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, mine)
    longest = max(int(size) for size in sizes)
    padded = torch.nn.functional.pad(seen.to(where), (0, longest - seen.shape[-1])).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:, : int(size)] for part, size in zip(parts, sizes, strict=True)], -1).to(seen.device)
