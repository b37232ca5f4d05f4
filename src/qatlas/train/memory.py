"""What a step of training needs in memory, told without taking it: the step runs on tensors that have shapes and no numbers.

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())                  # 7 billion parameters, no memory
    model = quantize(model.to(torch.bfloat16), rules)
    expected(model, {"input_ids": (1, 1024), "labels": (1, 1024)}, train=TRAINED).peak

PyTorch's fake tensors take the kernels and types of a real CPU, so what autograd keeps, what a backward makes and drops, and in which order, is the
program's own and no estimate of ours. Every storage is counted from the call that makes it until nobody refers to it. Not in it: what lies beside
tensors (the process, libraries, a GPU's context), scratch memory inside a kernel, and what an allocator rounds up or does not give back.

The step is a later one: moments exist, gradients of the step before are gone. Optimizers here keep two numbers for each trained one.
benchmarks/lowrank.py holds it against real steps: docs/performance.md.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..core.error import RunError
from .optim import trained

MOMENTS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes. weights: all parameters and buffers, trained ones among them. moments: of the optimizer. peak: the most that is held at one time."""

    weights: int
    trained: int
    moments: int
    peak: int

    @property
    def passing(self) -> int:
        """What the step itself needs at its peak: activations, gradients, what a layer computes on its way."""
        return self.peak - self.weights - self.moments


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.note(t)
        return out

    def note(self, t: Tensor) -> None:
        """Count the storage of a tensor, once, until it dies."""
        storage = t.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


def expected(model: nn.Module, batch: Mapping[str, Sequence[int]], train: str | Sequence[str] = "*", moments: int = MOMENTS) -> Memory:
    """What a step with a batch of these shapes (names of whole numbers, as token ids) needs. The model is on the meta device, and is used up.

    Raises:
        RunError: a model with numbers. RuleError: a glob that fits nothing.
    """
    if real := [name for name, p in model.named_parameters() if p.device.type != "meta"]:
        raise RunError(f"{real[0]} has numbers, and {len(real) - 1} more parameters; memory is told of a model without: build and quantize it under "
                       'torch.device("meta")')
    names = set(trained(model, train).values())
    with FakeTensorMode(allow_non_fake_inputs=True), Held() as held:
        model.to_empty(device="cpu").train()
        for name, p in model.named_parameters():
            p.requires_grad_(name in names)
        for t in (*model.parameters(), *model.buffers()):
            held.note(t)
        weights, chosen = held.now, [p for p in model.parameters() if p.requires_grad]
        widened = [torch.empty_like(p, dtype=torch.float32) for p in chosen for _ in range(moments)]
        kept = held.now - weights
        held.peak = held.now
        model(**{name: torch.zeros(tuple(shape), dtype=torch.long) for name, shape in batch.items()}).loss.backward()
        peak = held.peak
    del widened
    return Memory(weights, sum(p.numel() * p.element_size() for p in chosen), kept, peak)
