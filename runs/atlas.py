"""docs/atlas.md: all papers of the shelf on two real language models, at 4, 3, 2 and 1.58 bits, under equal conditions.

    stories   stories260K, a pretrained Llama of 260,032 parameters, on 1,024 stories that it wrote itself (a twentieth held out)
    zoo       the zoo's Llama of 3.4 million parameters on its own text

Equal: text and its order, optimizer steps, batch, judgement, peak learning rate of the weights (1e-3; papers that train adapters or scales alone
keep their own), one step an output channel, weights only. What a paper has besides (a rotation, an adapter, a block-wise phase, a loss from the
full-precision model) is the paper. Papers that need quantized inputs have them, and say so in their names. "plain" is full precision, trained as
long.

    QATLAS_DATA=... python runs/atlas.py --model stories|zoo [--out docs/evidence/atlas] [--seeds 3] [--steps 100] [--page docs/atlas.md]

Each run is kept as a small file: one that is there is not repeated. BiT has one bit for weights and activations and a schedule of its own:
docs/results.md#bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import torch
from lsq_stories260k import setting
from pages import between

from qatlas import papers
from qatlas.compare import compare
from qatlas.prepare import Job
from qatlas.report.compared import page, table
from qatlas.trial import Trials

BITS = [4, 3, 2, 1.58]
SHARED = {"lr": 1e-3, "input_bits": None, "group": None}
OWN = {"l4q": "l4q:lr=2e-3", "efficientqat": "efficientqat:lr=null", "fpq": "fpq:input_bits=8", "edgeqat": "edgeqat:input_bits=8"}
NOT_HERE = ("bit", "ternarybert", "teacher_intervention")         # encoders, or other arguments than bits
ROOT = Path(__file__).resolve().parent.parent


def entries() -> list[str]:
    """The control, LSQ, and the shelf."""
    return ["plain", "lsq", *(OWN.get(name, name) for name in papers.names() if name not in ("lsq", *NOT_HERE))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("stories", "zoo"), required=True)
    parser.add_argument("--out", default="docs/evidence/atlas")
    parser.add_argument("--scratch", default="out/paretoq_stories", help="where the model and the text that it writes are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="+", help="these entries, and no page")
    parser.add_argument("--without", nargs="+", default=[], help="entries that have not been run; the page says so")
    parser.add_argument("--page", help="the file whose section is made anew")
    given = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(given.out) / given.model
    if given.model == "stories":
        scratch = Path(given.scratch)
        scratch.mkdir(parents=True, exist_ok=True)
        folder = setting(Path(os.environ["QATLAS_DATA"]), scratch, 1024)[0]
        job = Job(model=str(folder), data=str(scratch / "stories.txt"), out=str(out), batch=8)
    else:
        job = Job(out=str(out), batch=4)
    wanted = [entry for entry in given.only or entries() if entry not in given.without]
    found = compare(wanted, job, BITS, given.steps, given.seeds, SHARED, "lsq" if "lsq" in wanted else None,
                    shlex.join(["python", "runs/atlas.py", *sys.argv[1:]]), say=lambda line: print(line, flush=True))
    found.model, found.data = ("stories260K", "stories that it wrote") if given.model == "stories" else ("zoo:gpt", "builtin:docs")
    print(table(found))
    if given.page and not given.only:
        publish(found, given.model, out, Path(given.page), given.without)


def publish(found: Trials, name: str, out: Path, where: Path, without: list[str]) -> None:
    """The section of docs/atlas.md, its figure, and docs/atlas.html of all models."""
    figure = ROOT / "docs" / "figures" / f"atlas_{name}.png"
    shutil.move(out / "comparison.png", figure)
    for made in ("report.html", "table.md"):
        (out / made).unlink()
    (out / "trials.json").write_text(json.dumps(found.to_json()), encoding="utf-8")
    left = f"Not run yet: {', '.join(without)}.\n\n" if without else ""
    text = f"{left}![quality against size and training time](figures/{figure.name})\n\n{table(found)}\n{claims(found)}"
    where.write_text(between(where.read_text(encoding="utf-8"), name, text), encoding="utf-8")
    kept = [Trials.from_json(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(out.parent.glob("*/trials.json"))]
    page(kept, ROOT / "docs" / "atlas.html")


def claims(found: Trials) -> str:
    """For each paper what it claims, and what came out here beside LSQ."""
    lines = [f"| paper | it claims | here, beside {found.against}, by bits |", "|---|---|---|"]
    for entry, claim in found.claims.items():
        told = []
        for bits in found.bits:
            beside = found.beside(entry, bits)
            if beside is not None:
                told.append(f"{bits:g}: {found.verdict(entry, bits)}, {beside[0].mean:.2f}× ({beside[1]} of {beside[2]} seeds)")
        lines.append(f"| {entry} | {claim} | {'; '.join(told)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
