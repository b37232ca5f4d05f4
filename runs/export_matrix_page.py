"""The section of docs/results.md that runs/export_matrix.py writes: a table for each model, targets and readers by bits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

BITS = (4, 3, 2, 1.58)
TITLES = {"stories": "stories260K", "zoo": "zoo:gpt"}
COMMAND = "QATLAS_DATA=... runs/export_matrix.sh"
ABOUT = """{command}: {models} are trained for {steps} steps (batch 4 of 128 tokens, seed 0; too short for good models:
the question is whether what was trained is what runs) and written to every target whose own writer takes them. Embeddings and head stay in full
precision.

A cell: the largest |difference| of a weight, read back by the format's public reader · of a logit, over {tokens} predicted tokens
· the engine's perplexity on them / ours. *exact*: both differences are 0. Of llama.cpp, which says probabilities, the difference is of
log-probabilities, of the 40 most probable tokens and of the next one; it rounds the inputs of every product to 8 bits, as the weight's type demands.
A number in brackets is the reason for a refusal, or for a reader that was not asked, below. A letter is the form in which the model was trained.
"""
READING = """Of {cells} targets asked {held} hold the model, {refused} are refused by their writer; {unasked} readings could not be made.
Weights: {weights} of {weighed} readings equal bit for bit. Logits: {exact} of {answered} equal; with inputs in full precision the others differ by at
most {onnx} (onnxruntime, OpenVINO), and by {llama} (a log-probability, llama.cpp). Where inputs are quantized an activation on the edge of two
codes falls the other way, now and then, and takes others along, the more the more layers follow. Largest difference of a logit (in the median
place): {ties}. OpenVINO finds codes by a product where the file says a division; asked about the first layer of stories260K alone it
agrees with us to 8e-6, about the first two in 96 of 100 places. Of all engines the perplexity is off by at most {share:.2f} %
({where}).
"""


def section(runs: Sequence[dict[str, Any]]) -> str:
    """The whole section."""
    models = [name for name in TITLES if any(run["model"] == name for run in runs)]
    tokens = " and ".join(f"{next(run['tokens'] for run in runs if run['model'] == name):,} ({TITLES[name]})" for name in models)
    steps = ", ".join(sorted({str(run["steps"]) for run in runs}))
    both = " and ".join(TITLES[name] for name in models)
    lines = ["## exports, asked\n", ABOUT.format(command=f"`{COMMAND}`", models=both, steps=steps, tokens=tokens), READING.format(**counted(runs))]
    notes: dict[str, int] = {}
    forms: dict[str, str] = {}
    for name in models:
        lines += [f"### {TITLES[name]}\n", table([run for run in runs if run["model"] == name], notes, forms)]
    lines += ["".join(f"- {letter}: {says}\n" for says, letter in forms.items())]
    return "\n".join([*lines, *(f"{n}. {note}" for note, n in notes.items())]) + "\n"


def table(runs: Sequence[dict[str, Any]], notes: dict[str, int], forms: dict[str, str]) -> str:
    """One model's table. Targets of a format that answer alike share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for form in sorted({run["format"] for run in runs}):
        by_bits = {run["bits"]: run["targets"] for run in runs if run["format"] == form}
        for target in dict.fromkeys(name for found in by_bits.values() for name in found):
            for by in readers(by_bits, target):
                cells = tuple(cell(by_bits.get(bits, {}).get(target), by, notes, forms) for bits in BITS)
                rows.setdefault((form, by, *cells), []).append(target)
    head = [f"| target | read by | {' | '.join(f'{bits:g} bits' for bits in BITS)} |", "|---" * (len(BITS) + 2) + "|"]
    return "\n".join([*head, *(f"| {form}: {', '.join(names)} | {by} | {' | '.join(cells)} |" for (form, by, *cells), names in rows.items())]) + "\n"


def readers(by_bits: dict[float, dict[str, Any]], target: str) -> list[str]:
    """All that were asked about a target, at any bits."""
    return list(dict.fromkeys(one["by"] for found in by_bits.values() for one in found.get(target, {}).get("read", ()))) or ["–"]


def cell(found: dict[str, Any] | None, by: str, notes: dict[str, int], forms: dict[str, str]) -> str:
    """What a reader says of a target at some bits."""
    if found is None:
        return "not run"
    if "refused" in found:
        return f"[{notes.setdefault(plain(found['refused']), len(notes) + 1)}]"
    one = next(one for one in found["read"] if one["by"] == by)
    letter = forms.setdefault(found["form"], chr(ord("a") + len(forms)))
    if "perplexity" not in one:
        weights = f"{one['weights']:.0g} · " if "weights" in one else ""
        return f"{letter} {weights}[{notes.setdefault(one['why'], len(notes) + 1)}]"
    if one.get("weights") == 0 and one["logits"] == 0:
        return f"{letter} exact · {number(one['perplexity'])}"
    weights = f"{one['weights']:.0g} · " if "weights" in one else ""
    return f"{letter} {weights}{one['logits']:.1e} · {number(one['perplexity'])} / {number(found['ours'])}"


def plain(why: str) -> str:
    """A reason without what is only this tensor's or this block's."""
    why = re.sub(r"^\d+ of \d+ values are", "some values are", why)
    why = re.sub(r"the (integers|numbers)( -?\d+ \.\. -?\d+)?( of \w+)? of [A-Z]+\d\w*(?=, )", r"the \1 of its block", why)
    why = re.sub(r", the block of \w+$", ", its block", why)
    return re.sub(r"^its input is quantized by .* would say otherwise.*", "its input is quantized otherwise than the file would say", why)


def number(perplexity: float) -> str:
    """Four digits."""
    return f"{perplexity:,.{3 if perplexity < 10 else 2 if perplexity < 100 else 1}f}"


def readings(runs: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, target's record, one reader's record."""
    for run in runs:
        for target, found in run["targets"].items():
            for one in found.get("read", ()):
                yield f"{run['format']}:{target}, {run['bits']:g} bits, {TITLES[run['model']]}, {one['by']}", found, one


def counted(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of the text."""
    cells = [found for run in runs for found in run["targets"].values()]
    read = list(readings(runs))
    answered = [(name, found, one) for name, found, one in read if "perplexity" in one]
    engines = [row for row in answered if row[2]["by"] in ("onnxruntime", "OpenVINO")]
    near = [row for row in answered if row[2]["by"] not in ("onnxruntime", "OpenVINO", "llama.cpp")]
    inputs = [row for row in (*engines, *near) if "inputs of 8 bits" in row[1]["form"] and row[2]["logits"]]
    worst = max(answered, key=lambda row: abs(row[2]["perplexity"] / row[1]["ours"] - 1), default=("", {"ours": 1.0}, {"perplexity": 1.0}))

    def most(rows: Sequence[tuple[str, dict[str, Any], dict[str, Any]]], key: str = "logits") -> str:
        return f"{max((one[key] for _, _, one in rows), default=0.0):.1e}"

    ties = [f"{by} {most(rows)} ({most(rows, 'median')})" for by in dict.fromkeys(row[2]["by"] for row in inputs)
            if (rows := [row for row in inputs if row[2]["by"] == by])]
    return {"cells": len(cells), "refused": sum("refused" in found for found in cells), "held": sum("refused" not in found for found in cells),
            "unasked": sum("perplexity" not in one for _, _, one in read), "weighed": sum("weights" in one for _, _, one in read),
            "weights": sum(one.get("weights") == 0 for _, _, one in read), "exact": sum(one["logits"] == 0 for _, _, one in answered),
            "onnx": most([row for row in engines if row not in inputs]), "ties": ", ".join(ties) or "none",
            "answered": len(answered),
            "llama": most([row for row in answered if row[2]["by"] == "llama.cpp"]),
            "share": 100 * abs(worst[2]["perplexity"] / worst[1]["ours"] - 1), "where": worst[0]}
