"""Records as real runs leave them, for the tests of the report: a small Llama at 1.58 bits, a classifier, an empty one, and one that went wrong."""

from __future__ import annotations

import math
import random

from qatlas.record import Record

LEAVES = {"self_attn.q_proj": (256, 256), "self_attn.k_proj": (128, 256), "self_attn.v_proj": (128, 256), "self_attn.o_proj": (256, 256),
          "mlp.gate_proj": (704, 256), "mlp.up_proj": (704, 256), "mlp.down_proj": (256, 704)}
WEIGHT = {"is": "core.quantizer:Quant", "grid": {"is": "core.grid:Ternary"}, "grain": {"is": "core.grain:Group", "size": 256}}


def score(perplexity: float) -> dict[str, float]:
    return {"loss": math.log(perplexity), "perplexity": perplexity, "tokens": 65536}


def llama(layers: int = 4, steps: int = 200) -> Record:
    """LSQ at 1.58 bits on a small Llama: full precision 17, untrained 5000, trained 24, packed and exported the same."""
    draw = random.Random(0)
    losses = [3.17 + 5.3 * math.exp(-7 * k / steps) + draw.gauss(0, 0.07) for k in range(steps)]
    names = [f"model.layers.{i}.{leaf}" for i in range(layers) for leaf in LEAVES]
    coverage = [{"name": name, "layer": "QLinear", "role": "linear", "shape": list(LEAVES[name.split(".", 3)[3]]), "weight": "Ternary 1.58b",
                 "input": "full", "bits": 1.585, "calls": [1, 1]} for name in names]
    coverage += [{"name": name, "layer": layer, "role": role, "shape": [4096, 256], "weight": "full", "input": "full", "bits": 32.0, "calls": [0, 0]}
                 for name, layer, role in (("model.embed_tokens", "Embedding", "@embedding"), ("lm_head", "Linear", "@head"))]
    trained = 24.103
    return Record(
        paper="lsq", model="zoo:gpt", data="zoo:text", fingerprint="9f2c41d07be6a835", target="gguf:tq2_0", seed=1, bits=1.585,
        arguments={"bits": 1.58, "group": 256, "lr": 1e-3, "scale_lr": 0.01, "steps": steps, "distil": False, "warmup": 0.05},
        command="qatlas run lsq --model zoo:gpt --data zoo:text --bits 1.58 --group 256 --lr 1e-3 --steps 200 --target gguf:tq2_0 --seed 1 --out x",
        rules=[{"is": "model.rules:Rule", "where": "@embedding", "weight": None}, {"is": "model.rules:Rule", "where": "*", "weight": WEIGHT}],
        coverage=coverage, scores={"full precision": score(17.052), "untrained": score(4987.3), "trained": score(trained), "packed": score(trained),
                                   "gguf:tq2_0": score(trained)},
        sizes={"full precision": 20_185_088, "packed": 9_212_416, "gguf:tq2_0": 5_011_456},
        history=[{"loss": losses, "lr": [1e-3 * min((k + 1) / 10, 0.5 + 0.5 * math.cos(math.pi * k / steps)) for k in range(steps)],
                  "grad_norm": [1 + draw.random() for _ in range(steps)], "seconds": [0.41] * steps, "tokens": [4096] * steps}],
        curve=[(step, score(math.exp(3.18 + 5.3 * math.exp(-7 * step / steps)))) for step in range(25, steps, 25)],
        errors={name: (0.21 + 0.05 * draw.random() + 0.01 * (k % 7), 0.17 + 0.05 * draw.random()) for k, name in enumerate(names)},
        samples={"full precision": "Once upon a time there was a little girl named Lily. She loved to play outside in the park.",
                 "untrained": "Once upon a time time of of the , the and and and",
                 "trained": "Once upon a time there was a little dog who liked to run."},
        proofs=[{"what": "28 weights of the file against the trained ones", "reader": "gguf.GGUFReader", "result": "largest difference 0",
                 "tolerance": 0, "reason": "dequantization is exact in float32", "passed": True},
                {"what": "logits of 64 tokens in the engine against ours", "reader": "llama.cpp (xllamacpp)", "result": "largest difference 3.1e-3",
                 "tolerance": 2e-2, "reason": "the engine quantizes activations to 8 bits", "passed": True}],
        times={"full precision": 2.1, "untrained": 2.4, "trained": 91.7, "packed": 2.2, "gguf:tq2_0": 6.3, "load": 0.8},
        peak_memory=1_431_655_765, versions={"python": "3.11.7", "qatlas": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        machine={"system": "Linux", "processor": "x86_64", "cores": 2, "threads": 1, "gpu": None})


def bare() -> Record:
    """Nothing but what must be there."""
    return Record(paper="lsq", arguments={}, command="qatlas run lsq")


def classifier() -> Record:
    """An image task: accuracy, no samples, no exports, a distance from a teacher as loss."""
    record = llama()
    record.scores = {"full precision": {"accuracy": 0.9312, "loss": 0.21}, "untrained": {"accuracy": 0.1004, "loss": 4.2},
                     "trained": {"accuracy": 0.9187, "loss": 0.25}}
    record.curve = [(step, {"accuracy": 0.92 - 0.5 * math.exp(-step / 40), "loss": 0.3}) for step in range(25, 200, 25)]
    record.model, record.target, record.sizes, record.samples, record.proofs = "zoo:vit", None, {}, {}, []
    return record


def broken() -> Record:
    """A run that went wrong: NaN, infinity, huge values, nothing where something should be, names nobody would choose."""
    record = llama()
    nan, inf = math.nan, math.inf
    record.scores = {"full precision": score(17.0), "untrained": {"perplexity": 1e304, "loss": 700.0}, "trained": {"perplexity": nan, "loss": nan},
                     "packed": {"perplexity": inf}, "gguf:tq2_0": {}, "$x_1$ <b>&": {"perplexity": 30.0}, "a\x00b" + "long" * 30: score(25.0)}
    record.history[0]["loss"][120:] = [nan] * 80
    record.curve = [(50, {"loss": nan}), (100, {"perplexity": inf})]
    record.errors = {"a": (nan, 1.0), "b": (0.0, 0.1), "c$": (1e-9, 1e40)}
    record.proofs.append({"what": "logits against ours", "reader": "engine <b>", "result": nan, "tolerance": 0, "reason": None, "passed": False})
    record.proofs.append({"what": "no verdict"})
    record.sizes = {"full precision": 0, "packed": 12, "gguf:tq2_0": None}  # type: ignore[dict-item]
    record.times, record.machine = {"trained": nan}, {"gpu": None}
    return record
