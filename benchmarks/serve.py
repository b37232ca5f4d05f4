"""What serving costs: a packed Llama of random weights beside itself in fp32 and bf16, dequantizing, on kernels, and in llama.cpp, in one run.

    python benchmarks/serve.py --json serve.json [--pairs 20] [--threads 2] [--page docs/performance.md]

Each form is a process of its own, and in each round all read a prompt and say tokens after it, in an order that rotates (qatlas.bench). Told are the
medians in tokens a second, the median over rounds of a form's seconds a token divided by those of bf16 with its 95 % interval by order statistics
(benchmarks/training.py says how), how near decoding comes to the limit of memory, and the peak of memory divided by the file's size: what a process
holds after loading and measuring, above one that has imported the library.

    w4       4 bits, groups of 32, fp16 steps: Q4_0 of llama.cpp          w4a8      the same with inputs in 8 bits a token
    w2a8     2 bits, groups of 64; no GGUF type holds these               w1.58a8   ternary with one step: TQ2_0

The json holds each round's seconds; a case that is there is not measured again, and another setting is refused.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "runs"), str(ROOT / "tests")]
MARK, BESIDE = "serving-cost", "bf16"
CASES = {"w4": ("w4-g32", "gguf:q4_0"), "w4a8": ("w4a8-g32", "gguf:q4_0"), "w2a8": ("w2a8-g64", None), "w1.58a8": ("w1.58a8-tensor", "gguf:tq2_0")}


def training() -> Any:
    """The bench of training, whose statistics and page these are."""
    spec = importlib.util.spec_from_file_location("training_cost", ROOT / "benchmarks" / "training.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(case: str, folder: Path, width: int, depth: int) -> tuple[Path, int]:
    """A packed directory with a tokenizer, and the number of its parameters in full precision."""
    from small import write_llama

    from qatlas.model.load import load
    from qatlas.model.pack import save
    from qatlas.model.rules import quantize

    scheme, target = CASES[case]
    heads = max(width // 64, 1)
    full = write_llama(folder / "full", width=width, intermediate_size=width * 8 // 3 // 256 * 256 or 2 * width, num_hidden_layers=depth,
                       num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048, vocab_size=4096)
    model, tokenizer = load(full)
    count = sum(p.numel() for p in model.parameters())
    return save(quantize(model, scheme, target=target), folder / "packed", tokenizer), count


def table(found: dict[str, Any], interval: Any) -> str:
    """One case."""
    setting, rounds = found["setting"], found["rounds"]
    rows = ["| | prompt, tokens/s | decoding, tokens/s | seconds a token beside bf16 | 95 % interval | of the limit | peak / file | load, s |",
            "|---|---|---|---|---|---|---|---|"]
    for row in found["rows"]:
        name = row["name"]
        if "absent" in row:
            rows.append(f"| {name} | absent: {row['absent']} | | | | | | |")
            continue
        ratio = ["", ""]
        if name != BESIDE and rounds.get(BESIDE) and len(rounds[name]) == len(rounds[BESIDE]):
            middle, low, high = interval([mine[1] / other[1] for mine, other in zip(rounds[name], rounds[BESIDE], strict=True)])
            ratio = [f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
        rows.append(f"| {name} | {row['prefill']:,.0f} | {row['decode']:,.1f} | {' | '.join(ratio)} | {row['decode'] / row['limit']:.0%} of "
                    f"{row['limit']:,.0f} | {row['peak'] / row['file']:.2f} of {row['file'] / 2**20:,.0f} MiB | {row['load']:.2f} |")
    ways = [f"{row['name']}: {'; '.join(row['routes'])}" for row in found["rows"] if row.get("routes")]
    spread = statistics.median(each[1] for each in rounds[BESIDE]) if rounds.get(BESIDE) else 0.0
    said = f"A round of bf16 decodes {setting['tokens']} tokens in {spread:.2f} s; memory reads {setting['bandwidth'] / 1e9:.1f} GB/s."
    return "\n".join([*rows, "", said, *ways]) + "\n"


def section(state: dict[str, Any], interval: Any) -> str:
    """The part of the page."""
    how = state["setting"]
    head = (f"## Serving\n\n`python benchmarks/serve.py --json serve.json --pairs {how['pairs']} --threads {how['threads']} "
            f"--page docs/performance.md`.\n\nA Llama of {how['parameters']:,} random parameters (embeddings and head in fp32), threads: "
            f"{how['threads']} ({how['cpu']}).\nA prompt of {how['prompt']} tokens, then {how['tokens']} said one by one; {how['pairs']} rounds, all "
            "forms in each. A ratio below 1 is faster than bf16.\n")
    return "\n".join([head, *(f"### {case}: {CASES[case][0]}\n\n{table(found, interval)}" for case, found in state["cases"].items())])


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, type=Path, help="what was measured; a case that is there is not measured again")
    parser.add_argument("--pairs", type=int, default=20, help="rounds")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="which cases to measure")
    parser.add_argument("--ways", default="", help="forms, with commas between them; by default all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each form")
    parser.add_argument("--prompt", type=int, default=128, help="tokens read at once")
    parser.add_argument("--tokens", type=int, default=16, help="tokens said one by one")
    parser.add_argument("--width", type=int, default=768, help="of the model")
    parser.add_argument("--depth", type=int, default=16, help="its layers")
    parser.add_argument("--page", type=Path, help="the page that gets the section; without it the section is only printed")
    given = parser.parse_args(arguments)
    from qatlas.bench import ALL, bench

    ours = training()
    shared = {key: value for key, value in ours.setting(given.threads, 0).items() if key in ("cpu", "threads", "versions")}
    how = shared | {key: getattr(given, key) for key in ("pairs", "prompt", "tokens", "width", "depth")}
    state = json.loads(given.json.read_text()) if given.json.exists() else {"setting": how, "cases": {}}
    if changed := [key for key in how if state["setting"].get(key) != how[key]]:
        raise SystemExit(f"{given.json} was measured with other {', '.join(changed)}; take another file")
    for case in given.cases:
        if case in state["cases"]:
            continue
        ours.say(case)
        with tempfile.TemporaryDirectory() as folder:
            packed, state["setting"]["parameters"] = made(case, Path(folder), given.width, given.depth)
            found = bench(packed, ways=[way for way in given.ways.split(",") if way] or ALL, prompt=given.prompt, tokens=given.tokens,
                          repeats=given.pairs, threads=given.threads, say=ours.say)
        state["cases"][case] = found | {"directory": case}
        aside = given.json.with_suffix(".new")
        aside.write_text(json.dumps(state, indent=1))
        aside.replace(given.json)
    text = section(state, ours.interval)
    if given.page:
        ours.write(given.page, text, MARK)
    print(text)
    return text


if __name__ == "__main__":
    main()
