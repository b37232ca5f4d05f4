"""What block-by-block training needs in memory, and that it does not grow with the number of blocks.

    python benchmarks/block_ap.py [--json FILE] [--depths 4 8 16] [--width 512] [--steps 4] [--batches 8] [--disk] [--page FILE]

A Llama of so many blocks lies in a safetensors file in bf16 and is loaded as a memory map: what is only read stays pages of the file, which the
system may drop. Each depth is measured in a fresh process. Counted is *private* memory (RssAnon of /proc/self/status, sampled every 2 ms): what the
process has written, and cannot be dropped. From the highest value seen during `reconstruct` is taken off

    before       what there was when the model had been loaded
    codes        the finished model: packed codes, steps and zeros of all blocks, which is what the work leaves behind

What remains is what the work itself needs: one block in fp32 with gradients and moments, two streams, and torch's working memory. glibc is told to
give freed tensors back (MALLOC_MMAP_THRESHOLD_): with its defaults blocks as small as these leave holes in the heap, some megabytes a block, which
tensors of more than 32 MiB, as real blocks have, do not. "whole" is the same
model under plain fp32 fine-tuning (masters, gradients, two moments: 16 bytes a weight), computed, not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "runs")]
MARK, ROWS, LENGTH, VOCABULARY = "block-ap", 2, 256, 1024
STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def private() -> int:
    """Bytes that this process has written and cannot drop."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """The highest private memory while it lasts."""

    def __enter__(self) -> Peak:
        self.most, self._on = private(), True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._on:
            self.most = max(self.most, private())
            time.sleep(0.002)

    def __exit__(self, *_: Any) -> None:
        self._on = False
        self._thread.join()
        self.most = max(self.most, private())


def config(width: int, depth: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth, num_attention_heads=width // 64,
                       num_key_value_heads=width // 64, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, tie_word_embeddings=False)


def mapped(file: Path, width: int, depth: int) -> Any:
    """The model with its weights as views of the file."""
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config(width, depth)).bfloat16()
    model.load_state_dict(load_file(file), assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)   # its buffers are computed, not stored
    return model.eval()


def one(file: Path, given: argparse.Namespace, depth: int) -> dict[str, int]:
    """One depth, in this process."""
    import torch

    from qatlas.core.grain import Group
    from qatlas.layers.packed import Packed
    from qatlas.model.roles import Role
    from qatlas.model.rules import Rule, keep_full
    from qatlas.papers.efficientqat import of_weight
    from qatlas.train import data
    from qatlas.train.optim import AdamW
    from qatlas.train.reconstruct import reconstruct
    from qatlas.train.run import Run
    from qatlas.train.task import LanguageModelling

    torch.set_num_threads(1)
    text = data.Text("the cat sat on a mat and the dog ran to the red barn " * 400, "the cat sat on a mat " * 40)
    task = LanguageModelling(text, lambda t: [ord(c) % VOCABULARY for c in t], length=LENGTH, batch=ROWS, run=Run(progress=False))
    model = mapped(file, given.width, depth)
    with torch.no_grad():
        model(input_ids=task.batch(0)["input_ids"])               # what torch sets up at its first forward is not ours
    before = private()
    rules = [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*", weight=of_weight(2, Group(64)))]
    with tempfile.TemporaryDirectory() as streams, Peak() as peak:
        reconstruct(model, task, rules=rules, train=["*weight", "*weight_quantizer.*"], optimizer=AdamW(lr=1e-4, scale_lr=1e-4), steps=given.steps,
                    batches=given.batches, packed=True, streams=streams if given.disk else None)
    stored = [layer.store for layer in model.modules() if isinstance(layer, Packed)]
    codes = sum(t.numel() * t.element_size() for store in stored for t in store.state_dict().values())
    weights = sum(p.numel() for p in mapped(file, given.width, depth).parameters())
    return {"depth": depth, "before": before, "peak": peak.most, "codes": codes, "own": peak.most - before - codes, "file": file.stat().st_size,
            "whole": 16 * weights, "block": 16 * sum(p.numel() for p in mapped(file, given.width, depth).model.layers[0].parameters())}


def write(file: Path, width: int, depth: int) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    save_file({name: t.bfloat16().contiguous() for name, t in LlamaForCausalLM(config(width, depth)).state_dict().items()}, file)


def table(found: list[dict[str, int]], given: argparse.Namespace) -> str:
    """In MiB."""
    mib = {name: [kept[name] / 2**20 for kept in found] for name in found[0]}
    lines = [f"A Llama of width {given.width} in bf16, {given.batches} batches of {ROWS} x {LENGTH} tokens, 2 bits in groups of 64, streams "
             f"{'on disk' if given.disk else 'in memory'}; MiB of private memory.", "",
             "| blocks | file | highest, over what was before | of it codes that stay | the work itself | fine-tuning the whole would take |",
             "|---|---|---|---|---|---|"]
    for i, kept in enumerate(found):
        lines.append(f"| {kept['depth']} | {mib['file'][i]:.0f} | {mib['peak'][i] - mib['before'][i]:.0f} | {mib['codes'][i]:.1f} | "
                     f"{mib['own'][i]:.0f} | {mib['whole'][i]:.0f} |")
    return "\n".join([*lines, "", f"One block in fp32 with gradients and moments is {mib['block'][0]:.0f} MiB."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--disk", action="store_true", help="streams on disk")
    parser.add_argument("--json", help="where the numbers are kept")
    parser.add_argument("--page", help="the file whose section is made anew")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(Path(given.one), given, given.depths[0])))
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for depth in given.depths:
            file = Path(folder) / f"{depth}.safetensors"
            write(file, given.width, depth)
            command = [sys.executable, __file__, "--one", str(file), "--depths", str(depth), "--width", str(given.width), "--steps",
                       str(given.steps), "--batches", str(given.batches), *(["--disk"] if given.disk else [])]
            told = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | STEADY)
            found.append(json.loads(told.stdout.splitlines()[-1]))
            file.unlink()
            print(found[-1], flush=True)
    text = table(found, given)
    print(text)
    if given.json:
        Path(given.json).write_text(json.dumps({"arguments": vars(given), "found": found}, indent=1) + "\n")
    if given.page:
        from pages import between

        page = Path(given.page)
        page.write_text(between(page.read_text(), MARK, text))


if __name__ == "__main__":
    main()
