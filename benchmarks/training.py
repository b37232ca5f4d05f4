"""What quantization-aware training costs: plain against quantized steps, ours beside the peers', in one run.

    python benchmarks/training.py --json cost.json [--pairs 20] [--threads 2] [--page docs/performance.md]

A Llama of 17.3 million parameters trains on 2,048 tokens a step with AdamW, in fp32 on CPU, plain and under each variant of a case. All of a case
stand in one process. A round steps each of them once, in an order that rotates, so whatever slows the machine slows all; a pair is a variant's and
plain's step of one round. Told is the median of the pairs' ratios with its interval by order statistics: of n ratios the k-th smallest and the k-th
largest, k the largest for which a fair coin gives fewer than k heads in n throws in at most 2.5 % of cases. It assumes of the ratios that they are
independent, and nothing of their distribution.

Memory is the peak of what torch's allocator holds (each allocation of a tensor is tracked, by torch's profiler) from the building of the model to
the end of its second step, when moments exist. What libraries take beside tensors is not in it, nor is what the allocator does not give back.

    w4        weights in 4 bits, groups of 32      ours: learned steps (LSQ). torchao and modelopt: steps by the largest value
    w4a8      and inputs in 8 bits, a token        brevitas: weights by channel, inputs by tensor, learned
    w1.58a8   ternary weights by channel           BitNet's
    whole     plain and ours by torch.compile as a whole: forward and backward are graphs, the optimizer is eager in both
    micro     eight micro-batches a step: weights quantized in each, once a step, and with gradients that wait for one pull
    distil    w1.58a8 with a teacher's logits as targets: the student's own weights with quantizers off, or a second model. Between "qatlas" and
              these lies the teacher's forward, and its loss

Embeddings and head stay full for all. "compiled" means that the fake quantization alone is compiled (but in "whole"), "recompute" keep="recompute".
The peers are imported where they are installed; a variant that is absent or fails stands in the table with its reason. The json holds each step's
seconds: the same command goes on where it was stopped, and another setting is refused.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "runs")]
MARK, GROUP = "training-cost", 32
ROWS, LENGTH, VOCABULARY = 8, 256, 4096
rows = ROWS                                                       # of a step; `--tokens` sets it
WIDTH, DEPTH = 384, 8

Build = Callable[[nn.Module, ExitStack], nn.Module]


def llama(width: int = WIDTH, depth: int = DEPTH) -> nn.Module:
    """The model, always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=depth, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, vocab_size=VOCABULARY, max_position_embeddings=2 * LENGTH, tie_word_embeddings=False,
        use_cache=False)).train()


def ours(scheme: str, compile: str = "no", keep: str = "buffer", gather: bool = False) -> Build:
    """qatlas as `fit` runs it: weights kept from write to write; compile: no, quant, step."""

    def build(model: nn.Module, stack: ExitStack) -> nn.Module:
        from qatlas.kernels.compiled import compiled
        from qatlas.layers.ahead import traced
        from qatlas.layers.gathered import gathering
        from qatlas.layers.quantized import Quantized
        from qatlas.model.rules import quantize

        model = quantize(model, scheme)
        for layer in model.modules():
            if isinstance(layer, Quantized):
                layer.keep = keep
        began = time.perf_counter()
        stack.enter_context(compiled(model)) if compile != "no" else None
        say(f"  compiled the fake quantization in {time.perf_counter() - began:.1f} s") if compile != "no" else None
        stack.enter_context(gathering(model, gather))
        return stack.enter_context(traced(model)) if compile == "step" else model

    return build


def stepped(model: nn.Module, stack: ExitStack) -> nn.Module:
    """The plain model, all of its forward and backward compiled."""
    model.compile()
    return model


def distilled(build: Build, own: bool) -> Build:
    """With the logits of a teacher in full precision as targets: the student's own weights (own), or a second model."""

    def made(model: nn.Module, stack: ExitStack) -> nn.Module:
        from qatlas.train.loss import kl
        from qatlas.train.teacher import full_precision

        teacher = None if own else llama().eval().requires_grad_(False)
        model = build(model, stack)

        def loss(given: dict[str, torch.Tensor]) -> torch.Tensor:
            with torch.no_grad():
                if teacher is None:
                    with full_precision(model):
                        target = model(input_ids=given["input_ids"]).logits
                else:
                    target = teacher(input_ids=given["input_ids"]).logits
            return kl(model(input_ids=given["input_ids"]).logits, target)

        model.benchmark_loss = loss  # type: ignore[assignment]
        return model

    return made


def torchao(inputs: bool, compile: bool) -> Build:
    def build(model: nn.Module, stack: ExitStack) -> nn.Module:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import FakeQuantizerBase, IntxFakeQuantizeConfig, QATConfig

        weight = IntxFakeQuantizeConfig(torch.int4, group_size=GROUP)
        token = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if inputs else None
        quantize_(model, QATConfig(activation_config=token, weight_config=weight, step="prepare"), body)
        for module in model.modules():
            if compile and isinstance(module, FakeQuantizerBase):
                module.compile(dynamic=True)
        return model

    return build


def modelopt(inputs: bool) -> Build:
    def build(model: nn.Module, stack: ExitStack) -> nn.Module:
        import modelopt.torch.quantization as mtq

        token = {"cfg": {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}} if inputs else {"enable": False}
        return mtq.quantize(model, {"quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: GROUP, "type": "static"}}},
            {"quantizer_name": "*input_quantizer", **token}, {"quantizer_name": "*lm_head*", "enable": False}], "algorithm": "max"},
            lambda m: m(**batch(0)))

    return build


def brevitas(model: nn.Module, stack: ExitStack) -> nn.Module:
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    for name, layer in [(name, module) for name, module in model.named_modules() if body(module, name)]:
        made = qnn.QuantLinear(layer.in_features, layer.out_features, bias=False, weight_quant=Int8WeightPerChannelFloat, weight_bit_width=4,
                               input_quant=Int8ActPerTensorFloat)
        made.weight = layer.weight
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)
    return model


def body(module: nn.Module, name: str) -> bool:
    """A linear layer that is not the head."""
    return isinstance(module, nn.Linear) and "lm_head" not in name


def plain(model: nn.Module, stack: ExitStack) -> nn.Module:
    return model


CASES: dict[str, dict[str, Build]] = {
    "w4": {"qatlas": ours("w4-g32"), "qatlas, compiled": ours("w4-g32", "quant"), "qatlas, compiled, recompute": ours("w4-g32", "quant", "recompute"),
           "torchao": torchao(False, False), "torchao, compiled": torchao(False, True), "modelopt": modelopt(False)},
    "w4a8": {"qatlas": ours("w4a8-g32"), "qatlas, compiled": ours("w4a8-g32", "quant"),
             "qatlas, compiled, recompute": ours("w4a8-g32", "quant", "recompute"),
             "torchao": torchao(True, False), "torchao, compiled": torchao(True, True), "modelopt": modelopt(True), "brevitas": brevitas},
    "w1.58a8": {"qatlas": ours("w1.58a8"), "qatlas, compiled": ours("w1.58a8", "quant")},
    "whole": {"qatlas, w4": ours("w4-g32", "step"), "qatlas, w4a8": ours("w4a8-g32", "step")},
    "micro": {"qatlas, w4, each": ours("w4-g32", "quant", "each"), "qatlas, w4, buffer": ours("w4-g32", "quant"),
              "qatlas, w4, buffer, gathered": ours("w4-g32", "quant", gather=True)},
    "distil": {"qatlas": ours("w1.58a8", "quant"), "qatlas, self-teacher": distilled(ours("w1.58a8", "quant"), True),
               "qatlas, teacher": distilled(ours("w1.58a8", "quant"), False)},
}
BASES: dict[str, Build] = {"whole": stepped}                      # what "plain" is, where it is not the eager model
MICROS = {"micro": 8}


class Trainee:
    """A model and its optimizer; a step is forward, backward, AdamW."""

    def __init__(self, build: Build, stack: ExitStack, model: nn.Module, micros: int = 1) -> None:
        self.model, self.micros = build(model, stack).train(), micros
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self, number: int) -> tuple[float, float]:
        """Seconds of the clock and of the processor."""
        given = batch(number)
        parts = [{name: t.chunk(self.micros)[i] for name, t in given.items()} for i in range(self.micros)]
        own, waits = getattr(self.model, "benchmark_loss", None), _waits() if self.micros > 1 else lambda *_: nullcontext()
        wall, cpu = time.perf_counter(), time.process_time()
        for i, part in enumerate(parts):
            with waits(self.model, i + 1 < self.micros):
                (self.model(**part).loss if own is None else own(part)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - wall, time.process_time() - cpu


def _waits() -> Callable[..., Any]:
    from qatlas.layers.gathered import waits

    return waits


def batch(number: int) -> dict[str, torch.Tensor]:
    """The same tokens for all in a round."""
    ids = torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "labels": ids}


def born(build: Build, stack: ExitStack, model: Callable[[], nn.Module], micros: int = 1) -> tuple[Trainee, int]:
    """A trainee after two steps, and the peak of its tensors in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        trainee = Trainee(build, stack, model(), micros)
        for number in range(2):
            trainee.step(number)
    changes = sorted((e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return trainee, most


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Median, and its 95 % interval by order statistics; (-inf, inf) of fewer than six.

    >>> interval(range(20))
    (9.5, 5, 14)
    """
    ordered, n = sorted(ratios), len(ratios)
    k = max((k for k in range(n) if 2 * sum(math.comb(n, i) for i in range(k)) <= 0.05 * 2**n), default=0)
    return statistics.median(ordered), *((ordered[k - 1], ordered[n - k]) if k else (-math.inf, math.inf))


def measure(case: str, found: dict[str, Any], pairs: int, save: Callable[[], None], model: Callable[[], nn.Module] = llama,
            only: Sequence[str] = ()) -> None:
    """Rounds of one case until there are so many pairs; `found` is filled as they come. only: these variants."""
    of = found.setdefault(case, {"rounds": [], "peak": {}, "absent": {}})
    if len(of["rounds"]) >= pairs:
        return
    with ExitStack() as stack:
        trainees = {}
        for name, build in {"plain": BASES.get(case, plain), **CASES[case]}.items():
            if only and name != "plain" and name not in only:
                continue
            began = time.perf_counter()
            try:
                trainees[name], of["peak"][name] = born(build, stack, model, MICROS.get(case, 1))
                say(f"{case}: {name}, first two steps {time.perf_counter() - began:.0f} s")
                of["absent"].pop(name, None)
                save()
            except Exception as error:                            # a peer that is not there or does not run: its reason is its row
                if name == "plain" or name.startswith("qatlas"):
                    raise
                of["absent"][name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
        for number in range(len(of["rounds"]), pairs):
            names = list(trainees)
            names = names[number % len(names):] + names[: number % len(names)]
            of["rounds"].append({name: trainees[name].step(number + 2) for name in names})
            save()
            say(f"{case}: round {number + 1} of {pairs}, plain {of['rounds'][-1]['plain'][0]:.2f} s")


def table(of: dict[str, Any], clock: int) -> str:
    """One case."""
    rows = [f"| | time, {len(of['rounds'])} pairs | 95 % interval | peak memory |", "|---|---|---|---|"]
    for name in [*of["peak"], *of["absent"]]:
        if name in of["absent"]:
            rows.append(f"| {name} | absent: {of['absent'][name]} | | |")
            continue
        peak = of["peak"][name]
        if name == "plain":
            told = statistics.median(r[name][clock] for r in of["rounds"])
            rows.append(f"| plain | 1 ({told:.2f} s) | | 1 ({peak / 2**20:,.0f} MiB) |")
            continue
        middle, low, high = interval([r[name][clock] / r["plain"][clock] for r in of["rounds"] if name in r])
        rows.append(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} | {peak / of['peak']['plain']:.3f} |")
    return "\n".join(rows) + "\n"


TITLES = {"w4": "Weights in 4 bits, groups of 32", "w4a8": "Weights in 4 bits, groups of 32; inputs in 8 bits, by token",
          "w1.58a8": "Ternary weights, inputs in 8 bits by token", "whole": "The whole step compiled, plain's too",
          "micro": "Eight micro-batches a step, plain's too", "distil": "Ternary weights, inputs in 8 bits by token, and a teacher's logits"}


def section(state: dict[str, Any], clock: str) -> str:
    """The part of the page."""
    how = state["setting"]
    told = "CPU seconds of the process" if clock == "cpu" else "seconds of the clock"
    head = (f"## Training\n\n`make bench`, or `python benchmarks/training.py --json cost.json --pairs {state['pairs']} --threads {how['threads']}"
            f"{' --clock cpu' if clock == 'cpu' else ''} --page docs/performance.md`.\n\n"
            f"A step of a Llama with {how['parameters']:,} parameters on {how['tokens']:,} tokens, fp32, {how['optimizer']}, threads: "
            f"{how['threads']} ({how['cpu']}),\nallocator: {how['allocator']}. {', '.join(f'{k} {v}' for k, v in how['versions'].items())}.\n"
            f"Time is {told}: the median over interleaved pairs of the quantized step divided by the plain one,\n"
            "its interval by order statistics. Memory is the peak of torch's tensors from building the model to the end of the second step,\n"
            "divided by plain's. \"Compiled\": the fake quantization alone. Ours learns its steps in 4 bits; brevitas has weights by channel\n"
            "and inputs by tensor, learned.\n")
    return "\n".join([head, *(f"### {TITLES[case]}\n\n{table(of, clock == 'cpu')}" for case, of in state["cases"].items() if of["rounds"])])


def setting(threads: int, parameters: int) -> dict[str, Any]:
    """What the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("torch", "transformers", "torchao", "nvidia-modelopt", "brevitas"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    malloc = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES"))]
    cpu = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    return {"parameters": parameters, "tokens": rows * LENGTH, "optimizer": "AdamW", "threads": threads, "cpu": cpu,
            "allocator": " ".join(malloc) or "the default malloc, untuned", "versions": versions}


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None, model: Callable[[], nn.Module] = llama) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, type=Path, help="what was measured; a run that was stopped goes on from it")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of each variant")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="which cases to measure")
    parser.add_argument("--variants", nargs="+", default=(), help="which variants of them; all, unless said")
    parser.add_argument("--tokens", type=int, default=ROWS * LENGTH, help=f"tokens of a step, in rows of {LENGTH}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine that others use, with one thread")
    parser.add_argument("--page", type=Path, help="the page that gets the section; without it the section is only printed")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    global rows
    rows = given.tokens // LENGTH
    state = json.loads(given.json.read_text()) if given.json.exists() else None
    how = setting(given.threads, state["setting"]["parameters"] if state else sum(p.numel() for p in model().parameters()))
    state = state or {"setting": how, "cases": {}}
    if state["setting"] != how:
        changed = [key for key in how if state["setting"].get(key) != how[key]]
        raise SystemExit(f"{given.json} was measured with other {', '.join(changed)}; take another file")

    def save() -> None:
        aside = given.json.with_suffix(".new")
        aside.write_text(json.dumps(state, indent=1))
        aside.replace(given.json)

    for case in given.cases:
        measure(case, state["cases"], given.pairs, save, model, given.variants)
    state["pairs"] = given.pairs
    made = section(state, given.clock)
    if given.page:
        write(given.page, made)
    print(made)
    return made


def write(page: Path, made: str, mark: str = MARK) -> None:
    """The section between its markers, at the page's end where it has none."""
    from pages import between

    text = page.read_text(encoding="utf-8") if page.exists() else "# What things cost\n"
    if f"<!-- {mark} -->\n" not in text:
        text = f"{text.rstrip()}\n\n<!-- {mark} -->\n<!-- /{mark} -->\n"
    page.write_text(between(text, mark, made), encoding="utf-8")


if __name__ == "__main__":
    main()
