"""Peak memory of L4Q and LR-QAT beside plain LoRA, and what `train/memory.py` told before.

A Llama (the class of transformers, random weights) on random tokens, AdamW over what trains. Each row is measured in a process of its own: build the
model, quantize it, take two steps. The number is the peak of what torch's allocator holds during the second step, when moments exist, by torch's
profiler, which tracks each allocation of a tensor. What libraries take beside tensors is not in it. Beside it stands what `expected` says of the same
step, from shapes alone.

    LoRA         adapters of rank 4 beside frozen weights in full precision: y = x W^T + (alpha / r) (x A^T) B^T, torch alone, none of our code
    L4Q          our paper as it is, rank 4, groups of 128, steps and offsets trained, weights frozen in the same type
    QAT-LoRA     the same numbers as L4Q by plain autograd: keep="each"
    LR-QAT       rank 32, one byte a weight
    LoRA, r=32   LoRA with LR-QAT's rank
    LSQ          all weights train, as `fit` runs it

`--types float32 bfloat16`: the type of the frozen weights, embeddings and activations; adapters, steps and moments are fp32 in all. `--told` predicts
larger models that are not measured: Llama of 7 billion parameters, in bfloat16, on a card of 24 GB.

    python benchmarks/lowrank.py --json memory.json [--types float32 bfloat16] [--told] [--page docs/performance.md]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "src"), str(ROOT / "runs"), str(ROOT / "benchmarks")]
MARK = "lowrank-memory"
SIZES = {"small": {"width": 256, "depth": 4, "vocabulary": 2048, "rows": 4, "length": 128},
         "middle": {"width": 512, "depth": 4, "vocabulary": 4096, "rows": 4, "length": 256}}
LARGE = {"width": 4096, "depth": 32, "vocabulary": 32000}         # Llama-2-7B; its mlp has 11,008
ROWS = ("LoRA", "L4Q", "QAT-LoRA", "LoRA, r=32", "LR-QAT", "LSQ")
CARD = 24e9
TOLD = (("LR-QAT", 1, False), ("LR-QAT", 4, True), *((row, rows, False) for rows in (1, 2, 4) for row in ("LoRA", "L4Q")))


class Beside(nn.Module):
    """Plain LoRA around a frozen linear layer."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a = nn.Parameter(torch.empty(rank, linear.in_features).normal_(std=0.02))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.a.T.to(x.dtype) @ self.b.T.to(x.dtype) * 2.0


def llama(size: dict[str, int], dtype: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width = size["width"]
    heads = width // (128 if width >= 4096 else 64)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=width, intermediate_size=11008 if width == 4096 else width * 3, num_hidden_layers=size["depth"], num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=size["vocabulary"], max_position_embeddings=4096, tie_word_embeddings=False, use_cache=False)
    ).to(getattr(torch, dtype))


def made(row: str, size: dict[str, int], dtype: str) -> tuple[nn.Module, Any]:
    """The model of a row, and the globs of what trains."""
    from qatlas.core.scheme import weight
    from qatlas.layers.adapter import Lora
    from qatlas.layers.frozen import Cast, Places
    from qatlas.model.rules import Rule, keep_full, quantize
    from qatlas.papers import l4q, lr_qat

    model, full = llama(size, dtype), keep_full("@embedding", "@head")
    if row.startswith("LoRA"):
        rank = 32 if "32" in row else 4
        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Beside(layer, rank))
        return model, ["*.a", "*.b"]
    if row in ("L4Q", "QAT-LoRA"):
        quant = l4q.of_weight(4, 128, "covering", None, False, None)
        return quantize(model, [*full, Rule("*", weight=quant, adapter=Lora(4, 8.0), frozen=Cast(),
                                            keep="recompute" if row == "L4Q" else "each")]), l4q.TRAINED
    if row == "LR-QAT":
        quant = lr_qat.of_weight(4, None, True, None)             # the start takes no part in what a step needs
        return quantize(model, [*full, Rule("*", weight=quant, adapter=Lora(32, 1.0, "shift"), frozen=Places(), keep="recompute")]), lr_qat.TRAINED
    return quantize(model, [*full, Rule("*", weight=weight(4), keep="each" if model.device.type == "meta" else "buffer")]), "*"


def measured(row: str, size: dict[str, int], dtype: str) -> dict[str, int]:
    """The peak of the second step, in bytes, and the bytes of the frozen weights' store."""
    from qatlas.model.quantized import quantized
    from qatlas.train.optim import trained

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        model, globs = made(row, size, dtype)
        model.train()
        chosen = trained(model, globs)
        for p in model.parameters():
            p.requires_grad_(p in chosen)
        optimizer = torch.optim.AdamW(list(chosen), lr=1e-4)
        for number in range(2):
            with torch.profiler.record_function(f"step {number}"):
                ids = torch.randint(size["vocabulary"], (size["rows"], size["length"]), generator=torch.Generator().manual_seed(number))
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    events = seen.profiler.kineto_results.events()
    begin = next(e.start_ns() for e in events if e.name() == "step 1")
    held = most = 0
    for at, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        most = max(most, held) if at >= begin else most
    stores = [layer.weight for layer in quantized(model).values()]
    return {"peak": most, "weights": sum(t.numel() for t in stores), "stored": sum(t.numel() * t.element_size() for t in stores)}


def told(row: str, size: dict[str, int], dtype: str, checkpointing: bool = False) -> dict[str, int]:
    """What `expected` says of the same step."""
    from qatlas.train.memory import expected

    with torch.device("meta"):
        model, globs = made(row, size, dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shape = (size["rows"], size["length"])
    found = expected(model, {"input_ids": shape, "labels": shape}, globs)
    return {"peak": found.peak, "weights": found.weights, "moments": found.moments}


def section(state: dict[str, Any]) -> str:
    """The part of the page."""
    lines = ["## Memory of low-rank training\n", "`python benchmarks/lowrank.py --json memory.json --told --page docs/performance.md`.\n",
             "Peak of torch's tensors in the second step, each row in a process of its own; \"told\" is `train/memory.py`, from shapes",
             "alone. Ratios are to LoRA in the same type and of the same rank: adapters beside frozen weights in full precision. "
             f"torch {state['torch']}, AdamW.\n"]
    for key, rows in state["measured"].items():
        if {"LoRA", "LoRA, r=32", "LR-QAT"} - set(rows):          # not measured to where ratios have a base
            continue
        lines += [f"### {key}\n", "| | peak | to LoRA | told | told / peak |", "|---|---|---|---|---|"]
        for row, found in rows.items():
            base = rows["LoRA, r=32" if row in ("LR-QAT", "LoRA, r=32") else "LoRA"]["peak"]
            lines.append(f"| {row} | {found['peak'] / 2**20:,.1f} MiB | {found['peak'] / base:.3f} | {found['told'] / 2**20:,.1f} MiB | "
                         f"{found['told'] / found['peak']:.3f} |")
        stored = rows["LR-QAT"]
        lines.append(f"\nLR-QAT's store: {stored['stored'] / stored['weights']:.3f} bytes a weight.\n")
    if state.get("told"):
        lines += ["### Llama-2-7B in bfloat16, told\n",
                  "| | rows x tokens | checkpointing | weights | moments | peak | to LoRA | on 24 GB |", "|---|---|---|---|---|---|---|---|"]
        plain = {found["rows"]: found["peak"] for found in state["told"] if found["row"] == "LoRA"}
        for found in state["told"]:
            beside = f"{found['peak'] / plain[found['rows']]:.3f}" if found["row"] == "L4Q" and found["rows"] in plain else ""
            lines.append(f"| {found['row']} | {found['rows']} x {found['length']} | {'blocks' if found['checkpointing'] else 'no'} | "
                         f"{found['weights'] / 1e9:.1f} GB | {found['moments'] / 1e9:.1f} GB | {found['peak'] / 1e9:.1f} GB | {beside} | "
                         f"{'fits' if found['peak'] < CARD else 'does not fit'} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="what was measured; what is there is not measured again")
    parser.add_argument("--types", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--told", action="store_true", help="predict the 7 billion too")
    parser.add_argument("--page", type=Path, help="the page that gets the section")
    parser.add_argument("--one", nargs=3, metavar=("ROW", "SIZE", "TYPE"), help="measure one row, here; print it as JSON")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.one:
        row, size, dtype = given.one
        print(json.dumps(measured(row, SIZES[size], dtype)))
        return
    state = json.loads(given.json.read_text()) if given.json.exists() else {"torch": torch.__version__, "measured": {}, "told": []}

    def save() -> None:
        given.json.write_text(json.dumps(state, indent=1))

    for size in given.sizes:
        for dtype in given.types:
            of = state["measured"].setdefault(f"{size}, {dtype}", {})
            for row in ROWS:
                if row not in of:
                    done = subprocess.run([sys.executable, __file__, "--json", str(given.json), "--one", row, size, dtype], capture_output=True,
                                          text=True, check=True)
                    of[row] = json.loads(done.stdout.splitlines()[-1]) | {"told": told(row, SIZES[size], dtype)["peak"]}
                    save()
                    print(size, dtype, row, of[row], file=sys.stderr, flush=True)
    for row, rows, checkpointing in TOLD if given.told else ():
        if not any((f["row"], f["rows"], f["checkpointing"]) == (row, rows, checkpointing) for f in state["told"]):
            size = LARGE | {"rows": rows, "length": 1024}
            state["told"].append({"row": row, "rows": rows, "length": 1024, "checkpointing": checkpointing,
                                  **told(row, size, "bfloat16", checkpointing)})
            save()
            print(state["told"][-1], file=sys.stderr, flush=True)
    text = section(state)
    if given.page:
        from training import write

        write(given.page, text, MARK)
    print(text)


if __name__ == "__main__":
    main()
