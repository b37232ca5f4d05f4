"""What packed products cost on a GPU, beside cuBLAS in bf16, torchao's int4 where it is installed, and the bytes that must move.

    python benchmarks/gpu.py --json gpu.json [--pairs 40] [--page docs/performance.md] [--guess] [--batches 1 16 64 256]

Needs an NVIDIA GPU, torch and Triton, and nothing else: of this library the floors core and kernels alone are imported.

First each kernel is held against dequantize-then-multiply, and fake quantization against the eager lines, on this device; what differs is printed
and not timed. Then, for each shape and batch, plans are tried (`--guess`: are not) and rounds are timed: a round times each variant once, in an order
that rotates. One time is that of a CUDA graph of many products over as many weights as fill three L2 caches, so that every weight comes from memory
and no launch is waited for, divided by their number. Told is the median over rounds of the ratio of cuBLAS's time to the variant's, with its 95 %
interval by order statistics, and the share of the bandwidth limit: bytes of codes, steps, zeros, inputs and outputs, over the rate at which torch
copies (bytes read and written), measured in the same run. Where the limit is not bytes (large batches) the share says little.

    cublas     torch.matmul, bf16 weights            w4, w3, w2, w1.58, w1, w8   bf16 inputs, groups of 128 (w1.58, w1: by channel)
    w4a8 ...   int8 inputs, a step a token (given)   fp8                         e4m3 both, by channel and token
    torchao    int4 weights, groups of 128, tinygemm layout

The json holds each round; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
MARK, SHAPES, BATCHES = "gpu-kernels", ((4096, 4096), (14336, 4096)), (1, 16, 64, 256)
Call = Callable[[], Any]


def reach() -> None:
    """Import core and kernels without the front page of the library, which imports transformers and more."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "runs")]
    if "qatlas" not in sys.modules:
        bare = types.ModuleType("qatlas")
        bare.__path__ = [str(ROOT / "src" / "qatlas")]
        sys.modules["qatlas"] = bare


def quants() -> dict[str, Any]:
    """What is said about the weight, by variant."""
    from qatlas.core.floats import Float
    from qatlas.core.grain import Group, PerChannel
    from qatlas.core.grid import Sign, Ternary, Uniform
    from qatlas.core.quantizer import Quant
    from qatlas.core.scale import AbsMax, AbsMean

    half = {"dtype": "float16"}
    some = {"w1": Quant(Sign(), PerChannel(), AbsMean(**half)), "w1.58": Quant(Ternary(), PerChannel(), AbsMean(**half))}
    some |= {f"w{bits}": Quant(Uniform(bits), Group(128), AbsMax(**half)) for bits in (2, 3, 4, 8)}
    some |= {"w1.58a8": some["w1.58"], "w2a8": some["w2"], "w4a8": some["w4"], "w8a8": Quant(Uniform(8), PerChannel(), AbsMax(**half))}
    return some | {"fp8": Quant(Float(4, 3), PerChannel(), AbsMax())}


class Case:
    """One variant of one shape and batch: its calls, one for each of `copies` weights."""

    def __init__(self, name: str, rows: int, width: int, batch: int, copies: int) -> None:
        self.name, self.rows, self.width, self.batch = name, rows, width, batch
        self.x = torch.randn(batch, width, device="cuda", dtype=torch.bfloat16)
        first = torch.randn(rows, width, device="cuda")
        self.calls: list[Call] = []
        self.bytes = 2 * batch * (rows + width)
        if name == "cublas":
            weights = [first.bfloat16() for _ in range(copies)]
            self.calls = [lambda w=w: torch.matmul(self.x, w.T) for w in weights]
            self.bytes += 2 * rows * width
        elif name == "torchao":
            self._torchao(first, copies)
        else:
            self._ours(first, copies)

    def _torchao(self, first: torch.Tensor, copies: int) -> None:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        layers = []
        for _ in range(copies):
            layer = torch.nn.Linear(self.width, self.rows, bias=False, device="cuda", dtype=torch.bfloat16)
            quantize_(layer, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
            layers.append(layer)
        self.calls = [lambda layer=layer: layer(self.x) for layer in layers]
        self.bytes += self.rows * self.width // 2 + self.rows * self.width // 128 * 4

    def _ours(self, first: torch.Tensor, copies: int) -> None:
        from qatlas.kernels.triton.linear import why_not_fp8
        from qatlas.kernels.triton.matrix import Matrix

        quant, self.kind = quants()[self.name], "gemv" if self.batch == 1 else "gemm"
        self.weight = quant.quantize(first)
        matrices = [Matrix.of(self.weight) for _ in range(copies)]
        self.bytes += matrices[0].nbytes()
        self.codes, self.steps = self.x, torch.ones(self.batch, device="cuda")
        if "a8" in self.name:
            self.kind, self.codes = "int8", torch.randint(-127, 128, self.x.shape, device="cuda").to(torch.int8)
            self.bytes += self.batch * (2 * self.rows - self.width)
        if self.name == "fp8":
            if reason := why_not_fp8(quant.grid, quant.grain, (self.rows, self.width), self.x.device):
                raise RuntimeError(reason)
            self.kind, self.codes = "fp8", self.x.to(torch.float8_e4m3fn)
            self.bytes += self.batch * (2 * self.rows - self.width)
        self.packed = [m.integers if self.kind == "int8" else m.floats for m in matrices]
        self.calls = self.with_plan(None)

    def with_plan(self, plan: Any) -> list[Call]:
        """The products by one plan; None: the one that is remembered or guessed."""
        from qatlas.kernels.triton.operators import product, product_fp8, product_int8

        if self.kind == "int8":
            return [lambda w=w: product_int8(self.codes, self.steps, None, w, None, None, plan) for w in self.packed]
        if self.kind == "fp8":
            return [lambda w=w: product_fp8(self.codes, self.steps, w, None, plan) for w in self.packed]
        return [lambda w=w: product(self.x, w, None, plan) for w in self.packed]

    def wrong(self) -> str:
        """How the product differs from dequantize-then-multiply; nothing where it does not."""
        if self.name in ("cublas", "torchao"):
            return ""
        y, w = self.calls[0]().double(), self.weight.dequantize().double()
        x = self.codes.double()
        off, size = (y - x @ w.T).abs(), x.abs() @ w.abs().T
        share = float((off / size.clamp(min=1e-30)).max())
        return f"off by {share:.2g} of the sum of magnitudes" if not share < (1e-5 if self.kind in ("int8", "fp8") else 1e-2) else ""

    def tune(self, most: int) -> None:
        """Remember the fastest plan."""
        from qatlas.kernels.triton.gemm import widest
        from qatlas.kernels.triton.gemm8 import widest as narrower
        from qatlas.kernels.triton.plan import tune

        wide = (widest if self.kind == "gemm" else narrower)(self.packed[0])

        def seconds(plan: Any) -> float:
            made = graph(self.with_plan(plan))
            return min(timed(made, len(self.packed)) for _ in range(3))

        tune(self.kind, self.packed[0], self.batch, seconds, wide, most)
        self.calls = self.with_plan(None)


def graph(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """All calls once, as one graph."""
    calls[0]()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        for call in calls:
            call()
    return made


def timed(made: torch.cuda.CUDAGraph, calls: int) -> float:
    """Seconds of one call of a replay."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    made.replay()
    begin.record()
    made.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / calls


def copied() -> float:
    """Bytes a second, read and written, of torch's copy of 1 GiB: the best of ten."""
    a = torch.empty(2**28, device="cuda")
    b = torch.empty_like(a)
    made = graph([lambda: b.copy_(a)] * 4)
    return 2 * 2**30 / min(timed(made, 4) for _ in range(10))


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Median, and its 95 % interval by order statistics; (-inf, inf) of fewer than six.

    >>> interval(range(20))
    (9.5, 5, 14)
    """
    ordered, n = sorted(ratios), len(ratios)
    k = max((k for k in range(n) if 2 * sum(math.comb(n, i) for i in range(k)) <= 0.05 * 2**n), default=0)
    return statistics.median(ordered), *((ordered[k - 1], ordered[n - k]) if k else (-math.inf, math.inf))


def measure(shape: tuple[int, int], batch: int, names: Sequence[str], pairs: int, most: int) -> dict[str, Any]:
    """Rounds of one shape and batch."""
    rows, width = shape
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    found: dict[str, Any] = {"rounds": [], "bytes": {}, "absent": {}, "plans": {}}
    graphs: dict[str, tuple[Any, int]] = {}
    kept: list[Case] = []
    for name in names:
        say(f"{rows}x{width} batch {batch}: {name}")
        try:
            bits = {"cublas": 16, "fp8": 8, "torchao": 4}.get(name) or float(name.split("a")[0][1:])
            copies = max(4, min(64, math.ceil(3 * cache / (rows * width * max(bits, 1) / 8))))
            case = Case(name, rows, width, batch, copies)
            if most and name not in ("cublas", "torchao"):
                case.tune(most)
            if wrong := case.wrong():
                found["absent"][name] = f"wrong: {wrong}"
                continue
            graphs[name], found["bytes"][name] = (graph(case.calls), copies), case.bytes
            kept.append(case)                                     # a graph does not own what it reads
        except Exception as error:                                # a peer that is not there, a chip without fp8: the reason is the row
            if name == "cublas":
                raise
            found["absent"][name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"
    for number in range(pairs):
        order = list(graphs)
        order = order[number % len(order):] + order[: number % len(order)]
        found["rounds"].append({name: timed(*graphs[name]) for name in order})
    return found


def checked() -> list[str]:
    """Fake quantization and the rotation on this device: what differs."""
    from qatlas.core.estimator import Clip, Ste, Trust
    from qatlas.core.grain import Group, PerChannel, PerToken
    from qatlas.core.grid import HalfStep, Sign, Ternary, Uniform
    from qatlas.core.hadamard import hadamard
    from qatlas.core.quantizer import Quant
    from qatlas.core.scale import AbsMax, AbsMean, Learned, MinMax, Rms
    from qatlas.kernels.triton import rotate
    from qatlas.kernels.triton.fake import Fused, check

    said, cuda = [], torch.device("cuda")
    for quant in (Quant(Uniform(4), Group(32), Learned(), Clip()), Quant(Ternary(), PerChannel(), AbsMean()),
                  Quant(Sign(), PerChannel(), AbsMean(), Ste()), Quant(HalfStep(2), PerChannel(), Learned(), Trust()),
                  Quant(Uniform(8, False), Group(32), Learned(MinMax()), Clip(0.5)), Quant(Uniform(8), PerToken(), AbsMax()),
                  Quant(Uniform(4), Group(32), Learned(MinMax(zero="offset")), Clip())):
        try:
            check(Fused(quant), cuda)
        except Exception as error:
            said.append(f"fake quantization: {error}")
    for dtype in (torch.float32, torch.bfloat16):
        x, quant = torch.randn(64, 4096, device="cuda").to(dtype), Quant(HalfStep(4), PerToken(), Rms(0.335), Trust())
        z = hadamard(x.float().unflatten(-1, (-1, 128))).flatten(-2)
        share = float((rotate.quantize(x, quant, 128)[0].float() - quant.hard(z).to(dtype).float()).abs().gt(0.1).float().mean())
        if not share < 1e-3:
            said.append(f"rotation in {dtype}: {share:.2%} of the values differ")
    return said


def passes(pairs: int) -> dict[str, Any]:
    """Fake quantization of 4096 x 4096, groups of 128, learned steps, forward and backward; the rotation; over a copy of the same bytes."""
    from qatlas.core.estimator import Clip, Trust
    from qatlas.core.grain import Group, PerToken
    from qatlas.core.grid import HalfStep, Uniform
    from qatlas.core.quantizer import Quant
    from qatlas.core.scale import Learned, Rms
    from qatlas.kernels.triton import rotate
    from qatlas.kernels.triton.fake import Fused

    x, g = (torch.randn(4096 * 32, 128, device="cuda") for _ in range(2))
    quant, four = Quant(Uniform(4), Group(128), Learned(), Clip()), Quant(HalfStep(4), PerToken(), Rms(0.335), Trust())
    place, formula, t, y = quant.measure(x), Fused(quant), torch.randn(4096, 4096, device="cuda").bfloat16(), torch.empty_like(x)
    calls: dict[str, Call] = {"copy": lambda: y.copy_(x), "fake, forward": lambda: formula.values(x, place, None),
                              "fake, backward": lambda: formula.pull(g, x, place, None, 1.0),
                              "rotate and quantize, bf16": lambda: rotate.quantize(t, four, 128)}
    graphs = {name: graph([call] * 4) for name, call in calls.items()}
    return {"rounds": [{name: timed(made, 4) for name, made in graphs.items()} for _ in range(pairs)]}


def section(state: dict[str, Any]) -> str:
    """The part of the page."""
    how, lines = state["setting"], []
    for key, of in state["cases"].items():
        lines.append(f"\n### {key}\n\n| | time | cuBLAS's time over it, {len(of['rounds'])} pairs | 95 % interval | share of the bandwidth limit |\n"
                     "|---|---|---|---|---|")
        for name, size in of["bytes"].items():
            seconds = statistics.median(r[name] for r in of["rounds"])
            middle, low, high = interval([r["cublas"] / r[name] for r in of["rounds"]])
            ratio = "| 1 | |" if name == "cublas" else f"| {middle:.2f} | {low:.2f} to {high:.2f} |"
            lines.append(f"| {name} | {seconds * 1e6:.1f} µs {ratio} {size / how['copy'] / seconds:.0%} |")
        lines += [f"| {name} | {reason} | | | |" for name, reason in of["absent"].items()]
    if of := state.get("passes"):
        lines.append("\n### Fake quantization, 4096x4096\n\n| | time over a copy's | 95 % interval |\n|---|---|---|")
        for name in of["rounds"][0]:
            middle, low, high = interval([r[name] / r["copy"] for r in of["rounds"]])
            lines.append(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    wrong = "".join(f"\n- {said}" for said in state["wrong"])
    return (f"## On a GPU\n\n`python benchmarks/gpu.py --json gpu.json --pairs {how['pairs']} --page docs/performance.md`\n\n"
            f"{how['device']}, torch {how['torch']}, Triton {how['triton']}. Copying: {how['copy'] / 1e12:.2f} TB/s read and written. Weights come\n"
            f"from memory (more of them than three caches hold), launches are those of a CUDA graph; plans {how['plans']}.{wrong}\n"
            + "\n".join(lines) + "\n")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, type=Path, help="what was measured; a run that was stopped goes on from it")
    parser.add_argument("--pairs", type=int, default=40, help="rounds of each case")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="rows of activations")
    parser.add_argument("--guess", action="store_true", help="take the plan that the shape suggests; else some are tried")
    parser.add_argument("--tries", type=int, default=40, help="plans that are tried at most; the first is the guess")
    parser.add_argument("--page", type=Path, help="the page that gets the section; without it the section is only printed")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py measures a GPU, and torch sees none here (torch.cuda.is_available() is False). The same kernels are "
                         "checked on CPU by: pytest tests/kernels/triton")
    reach()
    from qatlas.kernels.triton.lang import triton, why_not_here

    if reason := why_not_here(torch.device("cuda")):
        raise SystemExit(f"no Triton kernel runs here: {reason}")
    state = json.loads(given.json.read_text()) if given.json.exists() else {"cases": {}, "wrong": checked()}
    state["setting"] = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "triton": triton.__version__, "pairs": given.pairs,
                        "copy": copied(), "plans": "as guessed" if given.guess else f"the fastest of {given.tries}"}
    for said in state["wrong"]:
        say(said)
    for rows, width in SHAPES:
        for batch in given.batches:
            key = f"{rows}x{width}, batch {batch}"
            if key not in state["cases"]:
                state["cases"][key] = measure((rows, width), batch, ["cublas", "torchao", *quants()], given.pairs, 0 if given.guess else given.tries)
                given.json.write_text(json.dumps(state, indent=1))
                torch.cuda.empty_cache()
    state.setdefault("passes", passes(given.pairs))
    given.json.write_text(json.dumps(state, indent=1))
    made = section(state)
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
