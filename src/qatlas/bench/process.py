"""One contender of `qatlas bench` in a process of its own: a JSON request a line on stdin, a JSON answer a line on stdout.

    {"directory", "way", "threads"}     load; answers with seconds, bytes of its weights, and which layers take a kernel
    {"prompt", "tokens", "seed"}        one measurement: seconds of the prompt and of the tokens after it, and the peak of memory so far

Memory is the largest resident size less that of a process which has imported the library and the model's code. A mapped file counts where read.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

import torch
from torch import nn

from ..core.error import QuantError
from ..layers.experts import PackedStack, Stack
from ..layers.packed import Packed, PackedEmbedding, PackedLinear
from ..model.fast import fast, routes, told
from ..model.inner import installed
from ..model.load import load
from ..model.serving import cache

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAYS = (*TYPES, "exact", "fast")


def main() -> None:
    """Answer until there is nothing more to read."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                                 # whatever libraries print is no answer
    contender: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        if contender is None:
            contender, answer = begin(**request)
        else:
            answer = measure(contender, **request)
        out.write(json.dumps(answer) + "\n")
        out.flush()


def begin(directory: str, way: str, threads: int) -> tuple[Any, dict[str, Any]]:
    """(the model, what is to be said of it)."""
    import transformers

    torch.set_num_threads(threads)
    for name in transformers.AutoConfig.from_pretrained(directory).architectures or ():
        getattr(transformers, name, None)                         # transformers imports a model's code when it is first named
    before, began = peak(), time.perf_counter()
    model, _ = load(directory)
    if way in TYPES:
        dequantized(model, TYPES[way])
    lines = told(routes(fast(model))) if way == "fast" else []
    seconds = time.perf_counter() - began
    model.__dict__["qatlas_bench"] = before
    return model, {"load": seconds, "bytes": read(model), "routes": lines}


@torch.no_grad()
def measure(model: Any, prompt: int, tokens: int, seed: int) -> dict[str, Any]:
    """Read a random prompt, then say tokens one by one, the most probable each time. The tokens are the answer's `said`."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, prompt), generator=draw)
    try:
        past: Any = cache(model)
    except QuantError:                                            # nothing quantizes keys and values
        from transformers import DynamicCache

        past = DynamicCache(config=model.config.get_text_config())
    began = time.perf_counter()
    logits = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1).logits
    read_in, said = time.perf_counter(), []
    for _ in range(tokens):
        ids = logits[:, -1:].argmax(-1)
        said.append(int(ids))
        logits = model(input_ids=ids, past_key_values=past, use_cache=True).logits
    done = time.perf_counter()
    return {"prefill": read_in - began, "decode": done - read_in, "peak": peak() - model.__dict__["qatlas_bench"], "said": said}


def dequantized(model: Any, dtype: torch.dtype) -> Any:
    """A packed model as one in full precision, in place: its weights dequantized, its inputs not quantized.

    Raises:
        QuantError: a layer that is no linear, embedding or stack of experts, or has a transform, an adapter or a norm of its own.
    """
    made: dict[int, nn.Parameter] = {}
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Packed):
            continue
        if not isinstance(layer, PackedLinear | PackedEmbedding | PackedStack) or layer.adapter is not None or layer.norm is not None:
            raise QuantError(f"{name} is a {type(layer).__name__} with more than a weight; it has no form in full precision here")
        weight = made.setdefault(id(layer.store), nn.Parameter(layer.hard().to(dtype), requires_grad=False))
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _plain(layer, weight))
    for quantizer in installed(model).values():
        quantizer.on = False
    if installed(model):
        model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    return nn.Module.to(model, dtype)                             # transformers forbids .to() of what was packed


def _plain(layer: Any, weight: nn.Parameter) -> nn.Module:
    if isinstance(layer, PackedStack):
        return Stack(weight, layer.experts)
    with torch.device("meta"):
        rows, width = weight.shape
        plain: Any = nn.Embedding(rows, width, layer.padding_idx) if isinstance(layer, PackedEmbedding) else nn.Linear(width, rows, False)
    plain.weight = weight
    if getattr(layer, "bias", None) is not None:
        plain.bias = layer.bias
    return plain  # type: ignore[no-any-return]


def read(model: Any) -> int:
    """Bytes of weights that a token reads: all parameters and codes but the table in which it is looked up, unless that is the head too."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and {id(t) for t in table.state_dict(keep_vars=True).values()} & {id(t) for t in head.state_dict(keep_vars=True).values()}
    skipped = set() if tied else {id(t) for t in table.state_dict(keep_vars=True).values()}
    held = {id(t): t.numel() * t.element_size() for t in model.state_dict(keep_vars=True).values() if isinstance(t, torch.Tensor)}
    return sum(size for key, size in held.items() if key not in skipped)


def peak() -> int:
    """The largest resident size so far, in bytes. (What getrusage says begins, on Linux, with the size of the process that started this one.)"""
    try:
        with open("/proc/self/status", encoding="utf-8") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
