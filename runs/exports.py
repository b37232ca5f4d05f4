"""docs/exports.md: which scheme each target of each format holds exactly, asked of the targets themselves (export.able). runs/pages.py writes it.

    python runs/exports.py          # print the page

Rows are the schemes that the library speaks of, columns all targets that there are, found by listing; targets that answer alike share one.
"""

from __future__ import annotations

import importlib
import re

from qatlas.core.floats import Float
from qatlas.core.grain import Group, PerToken
from qatlas.core.grid import HalfStep, Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, Learned, MinMax
from qatlas.core.scheme import scheme
from qatlas.export import formats, targets
from qatlas.export.able import Numbers, reason, refusal

SHAPE = (8, 1024)                                                 # a multiple of every block and group below
BITS = ("w1", "w1-g128", "w1.58", "w1.58-g256", "w2", "w2-g16", "w3", "w3-g32", "w4", "w4-g32", "w4-g64", "w4-g128", "w4-tensor", "w8", "w8-g32")
OTHERS = {
    "w2 half-integers": Quant(HalfStep(2), scale=Learned(AbsMax())),
    "w4 asymmetric, whole zero": Quant(Uniform(4, False), scale=MinMax()),
    "w4-g32 asymmetric, whole zero": Quant(Uniform(4, False), Group(32), MinMax()),
    "w4-g32 asymmetric, offset": Quant(Uniform(4, False), Group(32), MinMax("offset")),
    "fp8 (E4M3)": Quant(Float(4, 3)),
    "mxfp4 (E2M1-g32)": Quant(Float(2, 1), Group(32)),
    "nvfp4 (E2M1-g16)": Quant(Float(2, 1), Group(16)),
}
INPUTS = {"full": None, "a8": scheme("w8a8").input, "a8 static": scheme("w8a8-static").input,
          "a8 float": Quant(Float(4, 3), PerToken(), AbsMax())}
LONG = 150                                                        # letters of a note


def families() -> dict[str, Quant]:
    """Name -> the Quant of the weight."""
    return {text: scheme(text).weight for text in BITS} | OTHERS


def answer(weight: Quant, target: str) -> dict[str, str | None]:
    """How the inputs are -> why the target cannot hold it, or None."""
    return {name: refusal(Numbers(weight, quant, None, SHAPE), target) for name, quant in INPUTS.items()}


def cell(found: dict[str, str | None], weight: Quant, says: bool, notes: dict[str, int]) -> str:
    """Exact, and with which inputs where the format says so; or the number of the reason."""
    able = [name for name, why in found.items() if why is None]
    if not able:
        why = short(str(found["full"]), weight)
        return f"[{notes.setdefault(why, len(notes) + 1)}]"
    if not says:
        return "exact"
    if able == ["full"] or len(able) == len(found):
        return "exact" if len(able) == 1 else "exact: any"
    return f"exact: {', '.join(able)}"


def short(why: str, weight: Quant) -> str:
    """A reason without the names of the numbers, in one sentence."""
    text = why.replace(str(weight.grid), "this grid").replace(str(weight.grain), "this grain")
    text = re.split(r"; (?=take |\w+: )", reason(text))[0]
    text = re.sub(r"(integers|numbers)( -?\d+ \.\. -?\d+)?( of \w+)? of [A-Z]+\d\w*", r"\1 of its block", text)
    text = re.sub(r"no integers of \d bits|not integers of \d bits", "no integers of so many bits", text)
    text = re.sub(r"a step of \d+ bits times (.*) takes more than the \d+ bits of \w+", r"a step times \1 takes more bits than it has", text)
    return text if len(text) <= LONG else text[: text.rfind(" ", 0, LONG)] + " ..."


def page() -> str:
    """The page."""
    rows, notes, parts = families(), {}, []
    for form in formats():
        module = importlib.import_module(f"qatlas.export.{form.replace('-', '_')}")
        says = hasattr(module, "fit_input") or hasattr(module, "why_not_signal")
        columns: dict[tuple[str, ...], list[str]] = {}
        for target in (name for name in targets() if name.partition(":")[0] == form):
            column = tuple(cell(answer(weight, target), weight, says, notes) for weight in rows.values())
            columns.setdefault(column, []).append(target.partition(":")[2])
        head = ["| scheme | " + " | ".join(", ".join(names) for names in columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
        body = [f"| {name} | " + " | ".join(column[i] for column in columns) + " |" for i, name in enumerate(rows)]
        inputs = ("Inputs: *full* precision, *a8* one step a token found at run time, *a8 static* one step a tensor, *a8 float* E4M3 with "
                  "one step a token; \"exact\" alone is full precision, *any* all of them (or the target leaves the quantizers of inputs out)."
                  if says else "Inputs are not in the file; the engine treats them in its own way.")
        parts.append(f"## {form}\n\n{inputs}\n\n" + "\n".join(head + body) + "\n")
    told = "\n".join(f"{n}. {note}" for note, n in notes.items())
    return ("<!-- made by runs/pages.py (runs/exports.py) from what the targets answer -->\n# What each export holds\n\n"
            "A cell is the answer of the target itself to a matrix of "
            f"{SHAPE[1]} inputs. *exact*: train with `--target FORMAT:TARGET`, and the file holds the trained weights bit for bit; the type of "
            "the steps is moved before training. A number in brackets is the reason why not, below. `can_export(model, target)` asks the same of a "
            "model of yours, and names the nearest scheme.\n\n" + "\n".join(parts) + f"\n## Reasons\n\n{told}\n")


if __name__ == "__main__":
    print(page())
