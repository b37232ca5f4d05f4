"""Every target, asked: two language models trained at 4, 3, 2 and 1.58 bits, written to all targets that can hold them, and read back by engines.

    python runs/export_matrix.py [--models stories zoo] [--bits 4 3 2 1.58] [--formats gguf ...] [--out docs/evidence/exports] [--page FILE]

    stories   stories260K, a pretrained Llama of 260,032 parameters (QATLAS_DATA), matrices of 64 or 172 inputs, on text that it wrote; judged on five
              real stories, each from its own beginning
    zoo       the zoo's Llama of 3.4 million parameters, matrices of 256 or 768 inputs, on its own text; judged on held-out text

A target decides numbers, so one model cannot serve all. Each is trained once, for as many steps, in a few forms (export_matrix_models.py), taught by
the full-precision logits (BitNet by labels), and the same trained model goes to every target that holds it: the first of `order` that the target's
own writer takes. Embeddings and head stay in full precision. The steps are numbers of 8 bits (bf16), which fp16 and fp32 hold too; where a target has
other steps the model is trained for it.

What came out is kept in small files, one for each model, bits and format; a target that is there is not asked again, unless its reader was missing.
For each target:

    weights      the largest |difference| of a weight, read by the format's public reader, from the trained one
    logits       the same of the logits, over all places of the text that judges, and the median of the places; of llama.cpp, which says
                 probabilities, of the log-probability of the 40 most probable tokens and of the next one
    perplexity   the engine's own, beside ours, per token of the same text

gptqmodel and executorch live in environments of their own, since pip finds no common versions: runs from there with --formats gptq awq, and with
--formats executorch, fill their rows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from export_matrix_models import STEPS, Asked, Place, forms, order, perplexity
from export_matrix_page import BITS, section
from pages import between
from torch import Tensor

from qatlas.core.error import FormatError, QatlasError
from qatlas.core.qtensor import QTensor
from qatlas.export import formats, targets
from qatlas.export import place as place_of
from qatlas.export import target as find_target
from qatlas.export.gguf import llamacpp
from qatlas.export.gguf.file import open_file
from qatlas.export.gguf.readers import overlooked
from qatlas.keep import size

TOP = 40                                                          # tokens whose log-probabilities llama.cpp is asked for


def ask(place: Place, bits: float, target: str) -> dict[str, Any]:
    """All that is to be said of one target."""
    form, kind = find_target(target)
    why = ""
    for name in order(target, forms(place.name, bits)):
        trained, path = place.trained(bits, name), place_of(place.exports, target)
        shutil.rmtree(place.exports, ignore_errors=True)
        try:
            form.plan(trained.data(), kind)
            form.write(trained.data(form, kind), path, kind)
        except FormatError as error:
            why = why or reason(str(error), trained)
            continue
        found = {"form": forms(place.name, bits)[name].says, "ours": trained.perplexity, "bytes": size(path), "read": []}
        for by, one in readers(form, target, path, trained, place.texts):
            found["read"].append({"by": by} | one)
        return found
    return {"refused": why}


def reason(message: str, trained: Asked) -> str:
    """Why a writer refuses, without the names of tensors and numbers."""
    grains = {(str(q.grid), str(q.grain)) for q in trained.data().tensors.values() if isinstance(q, QTensor)}
    text = message.split("\n")[0]
    for quant in set(trained.data().inputs.values()):
        text = text.replace(str(quant), "8 bits a token")
    text = re.sub(r"^.*? cannot hold [^:]*(: |, )", "", text)
    for grid, grain in grains:
        text = text.replace(grid, "this grid").replace(grain, "this grain")
    text = re.sub(r"^\S+ cannot hold .*?: ", "", text)
    return re.split(r"; (?=take |\w+: )", text)[0].rstrip(".")


def readers(form: Any, target: str, path: Path, trained: Asked, texts: list[Tensor]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of a reader or engine -> what it makes of the artefact."""
    format_ = target.partition(":")[0]
    if hasattr(form, "lacks") and form.lacks():
        yield format_, {"why": form.lacks(), "missing": True}
    elif hasattr(form, "ENGINES"):
        for engine in form.ENGINES:
            yield engine.NAME, guarded(partial(by_engine, form, engine, path, trained, texts))
    elif format_ == "gguf":
        yield "gguf, transformers", guarded(partial(by_transformers, form, path, trained, texts))
        yield "llama.cpp", guarded(partial(by_llamacpp, path, trained, texts))
    else:
        yield f"{'compressed-tensors' if format_ == 'awq' else 'gptqmodel' if format_ == 'gptq' else format_}, transformers", \
            guarded(partial(by_transformers, form, path, trained, texts))


def guarded(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it says, or why it says nothing."""
    try:
        return ask()
    except QatlasError as error:
        return {"why": str(error).split("\n")[0]}


def by_transformers(form: Any, path: Path, trained: Asked, texts: list[Tensor]) -> dict[str, Any]:
    """The weights by the public reader, the logits by the model that transformers loads."""
    weights = off_weights(form, form.read(path), trained, [])
    if form.SUFFIX:
        if why := overlooked(open_file(path)):
            return {"weights": weights, "why": why}
        from transformers import AutoModelForCausalLM

        made: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True)
    else:
        made = form.model(path)
    if isinstance(made, str):
        return {"weights": weights, "why": made, "missing": "not installed" in made}
    with torch.no_grad():
        logits = [made(input_ids=ids).logits[0].float() for ids in texts]
    return {"weights": weights} | off_logits(logits, trained, texts)


def by_engine(form: Any, engine: Any, path: Path, trained: Asked, texts: list[Tensor]) -> dict[str, Any]:
    """Weights and logits by an engine of a file with the whole computation."""
    if why := engine.why_not(path):
        return {"why": why, "missing": "not installed" in why}
    weights = off_weights(form, form.read(path, engine), trained, form.unused(path)[0])
    if hasattr(engine, "start"):
        run = engine.start(str(path))
        more = [{"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()} for ids in texts]
        logits = [torch.from_numpy(run({name: feed[name] for name in run.inputs})[0])[0] for feed in more]
    else:
        logits = [found[0] for found in engine.run(path, texts)]
    return {"weights": weights} | off_logits(logits, trained, texts)


def by_llamacpp(path: Path, trained: Asked, texts: list[Tensor]) -> dict[str, Any]:
    """llama.cpp itself. Its weights are those of the gguf package: it has no way to tell them."""
    if not llamacpp.available():
        return {"why": "llama.cpp is not installed here", "missing": True}
    said = llamacpp.each_logprob(path, [ids[0].tolist() for ids in texts], k=TOP)
    off: list[float] = []
    total = 0.0
    for logits, ids, places in zip(trained.logits, texts, said, strict=True):
        ours = logits.double().log_softmax(-1)
        for n, found in enumerate(places):
            tokens = torch.tensor(list(found))
            off.append(float((ours[n, tokens] - torch.tensor(list(found.values()), dtype=torch.float64)).abs().max()))
            total -= found[int(ids[0, n + 1])]
    return {"logits": max(off), "median": statistics.median(off), "perplexity": math.exp(total / len(off))}


def off_weights(form: Any, found: dict[str, Tensor], trained: Asked, gone: list[str]) -> float:
    """The largest difference of any tensor, quantized or not."""
    made = trained.data()
    kept = form.kept if hasattr(form, "kept") else lambda config, name, t: t
    ours = {name: t.dequantize() if isinstance(t, QTensor) else kept(made.config, name, t.float()) for name, t in made.tensors.items()
            if name not in gone}
    return max(float((t - found[name]).abs().max()) for name, t in ours.items())


def off_logits(logits: list[Tensor], trained: Asked, texts: list[Tensor]) -> dict[str, Any]:
    """How far the logits are from ours, how large ours are, and the perplexity."""
    off = torch.cat([(a - b).abs().amax(-1) for a, b in zip(logits, trained.logits, strict=True)])
    return {"logits": float(off.max()), "median": float(off.median()),
            "largest": max(float(t.abs().max()) for t in trained.logits), "perplexity": perplexity(logits, texts)}


def fill(place: Place, bits: float, name: str, out: Path) -> None:
    """One file: a model, bits and format. Written after each target."""
    file = out / f"{place.name}-w{bits:g}-{name}.json"
    found = json.loads(file.read_text()) if file.exists() else {"model": place.name, "bits": bits, "format": name, "steps": place.steps,
                                                               "tokens": place.tokens, "targets": {}}
    for target in (one for one in targets() if one.partition(":")[0] == name):
        there = found["targets"].get(target.partition(":")[2])
        if there is not None and not any(one.get("missing") for one in there.get("read", ())):
            continue
        began = sum(os.times()[:4])
        answer = ask(place, bits, target) | {"cpu seconds": round(sum(os.times()[:4]) - began, 1)}
        found["targets"][target.partition(":")[2]] = answer
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
        said = [one.get("why") or [one.get(key) for key in ("weights", "logits", "median", "perplexity")] for one in answer.get("read", ())]
        print(f"{place.name} {bits:g}", target, answer.get("refused") or said, answer["cpu seconds"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["stories", "zoo"], choices=["stories", "zoo"])
    parser.add_argument("--bits", nargs="*", type=float, default=BITS)
    parser.add_argument("--formats", nargs="*", default=formats(), choices=formats())
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/exports"))
    parser.add_argument("--scratch", type=Path, default=Path("out/export_matrix"), help="where trained models and exports are kept")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--page", type=Path, help="the file whose section is made anew")
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    for model in given.models:
        place = Place(model, given.scratch, given.steps)
        for bits in given.bits:
            for name in given.formats:
                fill(place, bits, name, given.out)
            place.trained.cache_clear()
    if given.page:
        made = section([json.loads(path.read_text()) for path in sorted(given.out.glob("*.json"))])
        given.page.write_text(between(given.page.read_text(encoding="utf-8"), "export-matrix", made), encoding="utf-8")


if __name__ == "__main__":
    main()
