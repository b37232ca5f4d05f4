"""One linear layer from packed weights, beside what else runs on a CPU, in one run.

    python benchmarks/linear.py --json linear.json [--pairs 20] [--threads 1] [--tokens 1 4 16 64] [--page docs/performance.md]

A layer of 4096 x 4096. Every engine has as many copies of its weight as fill 96 MiB or more and takes the next one each time, so that weights come
from memory as they do in a model. A round times each of them once, in an order that rotates; a pair is an engine's and the reference's time of one
round. Told is the median time, the fastest, and the median of the pairs' ratios with its interval by order statistics (as in training.py). The limit
is the time in which this machine reads the bytes of the weight, by a sum over 160 MB of floats in the same rounds and with as many threads.

    qatlas           1, 1.6 (five ternary digits a byte), ternary in 2, 2, 3, 4, 8 bits, by channel; 4 bits also by groups of 32 and 128
      int8           x quantized beforehand, one step a token: the kernel alone
      float          x in fp32
    torch            fp32; dynamic int8 (quantizes x itself); aten int4pack, bf16, groups of 32
    onnxruntime      MatMulNBits of 4 bits, blocks of 32 and 128, accuracy level 4 (int8 x); dynamic int8

The reference of the ratios is the engine named by --beside. llama.cpp has no way from Python to time one product (xllamacpp serves whole models): it
stands in the comparison of whole models. An engine that is absent or fails stands in the table with its reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "runs"), str(ROOT / "benchmarks")]
MARK, SIZE, COLD = "packed-linear", 4096, 96 * 2**20

Engine = tuple[Callable[[int], Any], int]                         # one product with the weight of that number; bytes of a weight


def copies(nbytes: int) -> int:
    return max(2, -(-COLD // nbytes))


def ours(text: str, integers: bool) -> Callable[[int], Engine]:
    def build(tokens: int) -> Engine:
        import dataclasses

        from qatlas.core.grain import Group, PerChannel
        from qatlas.core.grid import Sign, Ternary, Uniform
        from qatlas.core.qtensor import QTensor
        from qatlas.kernels.packed import Matrix, dense, linear, linear_int8

        bits, _, group = text.partition("-g")
        grid = Sign() if bits == "1" else Ternary() if bits in ("1.6", "ternary") else Uniform(int(bits))
        grain = Group(int(group)) if group else PerChannel()
        scale = torch.rand(grain.scale_shape((SIZE, SIZE)))
        if bits == "1.6":
            w = dense(Matrix.of(QTensor(torch.randint(0, 3, (SIZE, SIZE), dtype=torch.uint8), scale, None, None, grid, grain)))
        else:
            packed = torch.randint(0, 256, (SIZE, SIZE * int(grid.bits) // 8), dtype=torch.uint8)
            w = Matrix.from_parts(packed, scale, None, None, grid, grain, (SIZE, SIZE))
        ws = [dataclasses.replace(w, codes=w.codes.clone(), scale=w.scale.clone()) for _ in range(copies(w.nbytes()))]
        x, q, steps = torch.randn(tokens, SIZE), torch.randint(-128, 128, (tokens, SIZE), dtype=torch.int8), torch.rand(tokens)
        if integers:
            return lambda i: linear_int8(q, steps, None, ws[i % len(ws)]), w.nbytes()
        return lambda i: linear(x, ws[i % len(ws)]), w.nbytes()

    return build


def torch_fp32(tokens: int) -> Engine:
    x, ws = torch.randn(tokens, SIZE), [torch.randn(SIZE, SIZE) for _ in range(2)]
    return lambda i: torch.nn.functional.linear(x, ws[i % 2]), 4 * SIZE * SIZE


def torch_int8(tokens: int) -> Engine:
    layers = []
    for _ in range(copies(SIZE * SIZE)):
        layer = torch.nn.Sequential(torch.nn.Linear(SIZE, SIZE, bias=False))
        layers.append(torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, torch.qint8))
    x = torch.randn(tokens, SIZE)
    return lambda i: layers[i % len(layers)](x), SIZE * SIZE


def torch_int4(tokens: int) -> Engine:
    x = torch.randn(tokens, SIZE, dtype=torch.bfloat16)
    codes = torch.randint(0, 16, (SIZE, SIZE), dtype=torch.int32)
    ws = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1) for _ in range(copies(SIZE * SIZE // 2))]
    scales = torch.rand(SIZE // 32, SIZE, 2, dtype=torch.bfloat16)
    return (lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(x, ws[i % len(ws)], 32, scales),
            SIZE * SIZE // 2 + scales.numel() * 2)


def onnx(kind: str, block: int = 0) -> Callable[[int], Engine]:
    def build(tokens: int) -> Engine:
        import numpy as np
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        rng = np.random.default_rng(0)
        x = rng.standard_normal((tokens, SIZE), dtype=np.float32)
        given, made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [tokens, SIZE]) for n in ("x", "y")]
        if kind == "nbits":
            parts = {"w": rng.integers(0, 256, (SIZE, SIZE // block, block // 2), dtype=np.uint8),
                     "s": rng.random(SIZE * SIZE // block, dtype=np.float32)}
            nodes = [helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=SIZE, N=SIZE, bits=4, block_size=block,
                                      accuracy_level=4)]
        else:
            parts = {"w": rng.integers(-127, 128, (SIZE, SIZE)).astype(np.int8), "s": np.array(0.01, np.float32), "z": np.array(0, np.int8)}
            nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "qs", "qz"]),
                     helper.make_node("MatMulInteger", ["q", "w", "qz", "z"], ["i"]), helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
                     helper.make_node("Mul", ["qs", "s"], ["ss"]), helper.make_node("Mul", ["f", "ss"], ["y"])]
        nbytes = parts["w"].nbytes + parts["s"].nbytes
        graph = helper.make_graph(nodes, "g", [given], [made], [numpy_helper.from_array(v, k) for k, v in parts.items()])
        text = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
                                 ir_version=9).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        sessions = [onnxruntime.InferenceSession(text, options, providers=["CPUExecutionProvider"]) for _ in range(copies(nbytes))]
        return lambda i: sessions[i % len(sessions)].run(None, {"x": x}), nbytes

    return build


ENGINES: dict[str, Callable[[int], Engine]] = {
    **{f"qatlas {bits}, int8": ours(bits, True) for bits in ("1", "1.6", "ternary", "2", "2-g128", "3", "4", "4-g128", "4-g32", "8")},
    **{f"qatlas {bits}, float": ours(bits, False) for bits in ("1", "1.6", "ternary", "2", "3", "4", "4-g32", "8")},
    "torch fp32": torch_fp32, "torch dynamic int8": torch_int8, "aten int4pack g32 bf16": torch_int4,
    "onnxruntime MatMulNBits 4-bit g32": onnx("nbits", 32), "onnxruntime MatMulNBits 4-bit g128": onnx("nbits", 128),
    "onnxruntime dynamic int8": onnx("int8")}


def measure(tokens: int, pairs: int, names: Sequence[str]) -> dict[str, Any]:
    """Rounds of all engines; {"seconds": name -> list, "bytes": name -> int, "absent": name -> reason}."""
    engines: dict[str, Engine] = {}
    found: dict[str, Any] = {"seconds": {}, "bytes": {}, "absent": {}}
    big = torch.ones(40_000_000)
    for name in names:
        try:
            call, found["bytes"][name] = engines[name] = ENGINES[name](tokens)
            for i in range(2):
                call(i)
        except Exception as error:                                # a peer that is not there or does not run: its reason is its row
            if name.startswith("qatlas"):
                raise
            engines.pop(name, None)
            found["absent"][name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    engines["read"] = (lambda i: big.sum(), big.nbytes)
    found["bytes"]["read"] = big.nbytes
    for number in range(pairs):
        order = list(engines)
        for name in order[number % len(order):] + order[: number % len(order)]:
            begun = time.perf_counter()
            engines[name][0](number + 2)
            found["seconds"].setdefault(name, []).append(time.perf_counter() - begun)
        print(f"{tokens} tokens: round {number + 1} of {pairs}", file=sys.stderr, flush=True)
    return found


def table(found: dict[str, Any], beside: str) -> str:
    """One batch."""
    from training import interval

    speed = found["bytes"]["read"] / statistics.median(found["seconds"]["read"])
    rows = [f"| | ms | fastest | limit, ms | time beside {beside} | 95 % interval |", "|---|---|---|---|---|---|"]
    for name, seconds in found["seconds"].items():
        if name == "read":
            continue
        middle, low, high = interval([a / b for a, b in zip(seconds, found["seconds"][beside], strict=True)])
        rows.append(f"| {name} | {1e3 * statistics.median(seconds):.2f} | {1e3 * min(seconds):.2f} | {1e3 * found['bytes'][name] / speed:.2f} | "
                    f"{middle:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(rows + [f"| {name} | absent: {why} | | | | |" for name, why in found["absent"].items()]) + "\n"


def section(state: dict[str, Any]) -> str:
    """The part of the page."""
    head = (f"## Packed weights on CPU\n\n`python benchmarks/linear.py --json linear.json --pairs {state['pairs']} --threads {state['threads']} "
            "--page docs/performance.md`\n\n"
            f"One layer of {SIZE} x {SIZE}, weights out of cache, threads: {state['threads']}, kernels: {state['variant']}, on {state['cpu']}.\n"
            "Medians of interleaved rounds; the limit is the time to read the weight's bytes, measured in the same rounds.\n")
    return "\n".join([head, *(f"### {tokens} token{'s' if tokens != '1' else ''}\n\n{table(found, state['beside'])}"
                              for tokens, found in state["batches"].items())])


def main(arguments: Sequence[str] | None = None) -> str:
    from qatlas.kernels.library import variant

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, type=Path, help="what was measured; batches that are there are not measured again")
    parser.add_argument("--pairs", type=int, default=20, help="rounds of each batch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each engine")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64], help="batches")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES), help="which")
    parser.add_argument("--beside", default="torch dynamic int8", choices=list(ENGINES), help="the reference of the ratios")
    parser.add_argument("--page", type=Path, help="the page that gets the section; without it the section is only printed")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "this machine")
    how = {"threads": given.threads, "variant": variant(), "cpu": cpu, "beside": given.beside, "pairs": given.pairs}
    state = json.loads(given.json.read_text()) if given.json.exists() else {**how, "batches": {}}
    if changed := [key for key in how if state[key] != how[key]]:
        raise SystemExit(f"{given.json} was measured with other {', '.join(changed)}; take another file")
    for tokens in given.tokens:
        if str(tokens) not in state["batches"]:
            state["batches"][str(tokens)] = measure(tokens, given.pairs, list(dict.fromkeys([*given.engines, given.beside])))
            aside = given.json.with_suffix(".new")
            aside.write_text(json.dumps(state, indent=1))
            aside.replace(given.json)
    made = section(state)
    if given.page:
        from training import write

        write(given.page, made, f"{MARK}-{given.threads}")
    print(made)
    return made


if __name__ == "__main__":
    main()
