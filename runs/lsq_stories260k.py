"""LSQ against round-to-nearest on a real, pretrained Llama of 260,032 parameters, at 8, 4, 3 and 2 bits.

Training text: no TinyStories text is at hand, so the full-precision model writes it (data-free, as LLM-QAT does): `--stories` samples at temperature
1, each from its own beginning. All trained rows see the same text in the same order for the same seed, the same number of steps and schedule.
Judged on five real stories that none of them has seen (1,804 tokens, each story from its own beginning): full precision 3.55.

    rows        round-to-nearest with absmax steps; the same with the step of least squared error; LSQ trained on the text; LSQ
                taught by the full-precision logits; and the boring control: the full-precision model trained as long on the same text
    all layers  weights per output channel, every linear layer but the head
    gguf        trained for q8_0 (8 bits) or q4_0 (4, 3, 2 bits: their codes are codes of q4_0), groups of 32; down_proj stays full, since its 172
                inputs are no multiple of 32; written, and read back by the gguf package, transformers and llama.cpp

    python runs/lsq_stories260k.py [--out out/lsq_stories260k] [--seeds 3] [--steps 150] [--stories 1024]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch
from stories260k import prepare
from transformers import AutoModelForCausalLM, AutoTokenizer

from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, MseSearch
from qatlas.job import run
from qatlas.model.load import load
from qatlas.model.roles import Role
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.papers.lsq import signed
from qatlas.prepare import Job
from qatlas.train.data import Text
from qatlas.train.fit import fit
from qatlas.train.optim import AdamW
from qatlas.train.run import Run
from qatlas.train.schedule import cosine
from qatlas.train.task import LanguageModelling

BITS = (8, 4, 3, 2)
FULL_DOWN = [{"is": "model.rules:Rule", "where": "*.down_proj", "weight": None}]


@torch.no_grad()
def perplexity(model, tokenizer, text: str) -> float:
    """Per token, each story from its own beginning."""
    total, count = 0.0, 0
    for story in filter(None, (part.strip() for part in text.split("<|endoftext|>"))):
        ids = tokenizer(story, return_tensors="pt")["input_ids"]
        loss = float(model.eval()(input_ids=ids, labels=ids).loss)
        total, count = total + loss * (ids.shape[1] - 1), count + ids.shape[1] - 1
    return math.exp(total / count)


@torch.no_grad()
def write_stories(model, tokenizer, n: int, path: Path) -> None:
    """n samples at temperature 1, as text with the begin token before each."""
    torch.manual_seed(0)
    stories: list[str] = []
    while len(stories) < n:
        begin = torch.full((128, 1), tokenizer.bos_token_id)
        out = model.generate(input_ids=begin, attention_mask=torch.ones_like(begin), do_sample=True, top_k=0, max_new_tokens=255,
                             pad_token_id=tokenizer.eos_token_id)
        stories += [tokenizer.decode(row[1:], skip_special_tokens=True) for row in out]
    path.write_text("".join(f"<s>{story}\n" for story in stories[:n]), encoding="utf-8")


def setting(data: Path, out: Path, stories: int) -> tuple[Path, torch.nn.Module, object, Text, str]:
    """The model's directory, the model, its tokenizer, the text that it wrote (a twentieth held out), and the real stories."""
    folder, real = prepare(data / "ckpt/stories260k", out / "model"), (data / "text/tinystories_5stories.txt").read_text(encoding="utf-8")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if not (out / "stories.txt").exists():
        write_stories(model, tokenizer, stories, out / "stories.txt")
    text = (out / "stories.txt").read_text(encoding="utf-8")
    cut = text.rfind("<s>", 0, len(text) * 19 // 20)
    return folder, model, tokenizer, Text(text[:cut], text[cut:]), real


def rounded(folder: Path, weight: Quant) -> torch.nn.Module:
    """The model with its weights rounded and nothing trained."""
    model, _ = load(str(folder))
    return quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*", weight=weight)])


def longer(folder: Path, tokenizer, text: Text, steps: int, seed: int) -> torch.nn.Module:
    """The boring control: full precision, trained as long on the same text."""
    model, _ = load(str(folder))
    task = LanguageModelling(text, tokenizer, length=256, batch=8, run=Run(None, seed=seed))
    fit(model, task, optimizer=AdamW(lr=1e-3), schedule=cosine(0.05), steps=steps)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/lsq_stories260k")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--stories", type=int, default=1024)
    given = parser.parse_args()
    data, out = Path(os.environ["QATLAS_DATA"]), Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    folder, model, tokenizer, parts, real = setting(data, out, given.stories)
    (out / "rules.json").write_text(json.dumps(FULL_DOWN))
    results = {"full precision": [perplexity(model, tokenizer, real)]}
    sizes: dict[str, int] = {"full precision": 2 * sum(p.numel() for p in model.parameters())}
    results["full precision, trained as long"] = [perplexity(longer(folder, tokenizer, parts, given.steps, seed), tokenizer, real)
                                                  for seed in range(given.seeds)]
    for bits in BITS:
        for name, scale in (("absmax", AbsMax()), ("least squares", MseSearch())):
            results[f"{bits} bits, round-to-nearest, {name}"] = [perplexity(rounded(folder, Quant(signed(bits), scale=scale)), tokenizer, real)]
        for teach, name in ((False, "LSQ"), (True, "LSQ, taught")):
            for seed in range(given.seeds if teach else 1):
                kept = one(out, folder, tokenizer, real, bits, seed, given.steps, teach, None)
                results.setdefault(f"{bits} bits, {name}", []).append(kept["perplexity"])
                sizes[f"{bits} bits, {name}"] = kept["bytes"]
        target = "gguf:q8_0" if bits == 8 else "gguf:q4_0"
        kept = one(out, folder, tokenizer, real, bits, 0, given.steps, True, target)
        results[f"{bits} bits, LSQ, taught, {target}"], sizes[f"{bits} bits, LSQ, taught, {target}"] = [kept["perplexity"]], kept["bytes"]
        for proof in kept["proofs"]:
            print("   ", proof["passed"], proof["reader"], proof["result"], flush=True)
    (out / "results.json").write_text(json.dumps({"perplexity": results, "bytes": sizes, "arguments": vars(given)}, indent=1))
    print("| | perplexity | bytes |\n|---|---|---|")
    for name, values in results.items():
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(f"| {name} | {statistics.mean(values):.2f}{spread} | {sizes.get(name, 0) or '':,} |" if name in sizes else
              f"| {name} | {statistics.mean(values):.2f}{spread} | |")


def one(out: Path, folder: Path, tokenizer, real: str, bits: int, seed: int, steps: int, teach: bool, target: str | None) -> dict:
    """One trained run, kept in its own directory; a run that is there already is not repeated."""
    where = out / f"b{bits}-s{seed}{'-taught' if teach else ''}{'-gguf' if target else ''}"
    if (where / "kept.json").exists():
        return json.loads((where / "kept.json").read_text())
    began = time.perf_counter()
    slow = 0.1 if bits == 8 else 1.0                              # the paper's recipe: a tenth of the learning rate at 8 bits
    arguments = {"bits": bits, "distil": teach, "lr": 1e-3 * slow, "scale_lr": 0.01 * slow, "steps": steps, "group": 32 if target else None}
    job = Job(model=str(folder), data=str(out / "stories.txt"), target=target, rules=str(out / "rules.json") if target else None, out=str(where),
              seed=seed, batch=8, resume=where.exists())
    outcome = run("lsq", arguments, job)
    size = outcome.record.sizes[target] if target else outcome.record.sizes["packed"]
    kept = {"perplexity": perplexity(outcome.model, tokenizer, real), "bytes": size, "proofs": outcome.record.proofs,
            "seconds": time.perf_counter() - began}
    (where / "kept.json").write_text(json.dumps(kept))
    print(where.name, f"{kept['perplexity']:.3f}", f"{kept['seconds']:.0f} s", flush=True)
    return kept


if __name__ == "__main__":
    main()
