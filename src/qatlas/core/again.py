"""Again: large memory that is handed out again when nobody holds it any longer.

malloc gives a block of more than 32 MiB back to the system when it is freed, and the next one of that size is made of fresh pages, each with a
fault: four times the seconds of the arithmetic that fills them. A training step makes a gradient of the weight's size in every backward and drops
it before the next. So the last such block is remembered here, one of each size, and given to the next who asks, if nobody sees it: no tensor, no
view, no array, no handle of its storage. Else the answer is fresh memory as ever. What is handed out is an ordinary tensor; autograd may take it as
`.grad`.

What is needed for a moment only (the gradient of a kept weight, on its way through the quantizer) is remembered apart, in smaller sizes, too: fresh
memory for it would lie between blocks that stay, and what malloc gives back at the end of a step it must fault in again in the next.

It costs what it remembers: for each of at most KEPT sizes one block that would have been given back. Other memory than the CPU's is not our affair.
"""

from __future__ import annotations

import sys
from threading import Lock

import torch
from torch import Tensor

LARGE, SMALL, KEPT = 2**25, 2**16, 8                              # bytes, bytes; sizes

_one = Lock()                                                     # two threads must not find the same block alone
_known: dict[tuple[int, bool], tuple[Tensor, tuple[int, int]]] = {}         # bytes, for a moment -> memory, how often it is held while it is idle


def empty(x: Tensor, moment: bool = False) -> Tensor:
    """Contiguous memory for numbers like x; for a large x such as was used before, where there is some. moment: it is dropped soon."""
    large = x.nbytes >= (SMALL if moment else LARGE)
    if x.device.type == "cpu" and large and not torch.compiler.is_compiling() and _plain(x):
        with _one:
            return _like(x, _memory(x.nbytes, moment))
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def forget() -> None:
    """Give back what is remembered; what somebody holds stays theirs."""
    _known.clear()


def _like(x: Tensor, memory: Tensor) -> Tensor:
    """The memory as numbers like x, contiguous; from here on somebody holds it."""
    return torch.empty(0, dtype=x.dtype).set_(memory.untyped_storage()).view(x.shape)  # type: ignore[call-overload,no-any-return]


def _memory(size: int, moment: bool) -> Tensor:
    """The last block of this kind, if nobody sees it, or a new one, which is then the last."""
    if (size, moment) in _known:
        memory, alone = _known[size, moment]
        if _holders(memory) == alone:
            return memory
    elif len(_known) >= KEPT:
        _known.pop(next(iter(_known)))
    memory = torch.empty(size, dtype=torch.uint8)
    _known[size, moment] = memory, _holders(memory)
    return memory


def _holders(memory: Tensor) -> tuple[int, int]:
    """How often the storage is held: by tensors, and by Python's handle of it."""
    storage = memory.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


def _plain(x: Tensor) -> bool:
    """A tensor with numbers, outside of any mode that makes others."""
    return type(x) in (Tensor, torch.nn.Parameter) and torch._C._len_torch_dispatch_stack() == 0 and not torch._C._functorch.maybe_current_level()
