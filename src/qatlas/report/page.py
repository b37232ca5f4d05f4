"""The report: a record, or several, as one HTML file that needs no network, no script and no other file.

Everything is there to be checked: scores by stage beside full precision, what was proved and with which reader, which tensor got which numbers, and
the command that repeats the run. What a record lacks is left out; nothing is drawn or said that it does not hold.

Text that models or users wrote is untrusted: the template escapes everything, and a content security policy in the page forbids scripts, forms and
requests, whatever slips in. The same records give the same bytes: nothing asks for the time or the machine.

A proof is a dict: `what` was compared, with which `reader`, the `result`, the `tolerance` and its `reason`, and whether it `passed` (True, False, or
absent: not judged). Other keys are shown behind the result.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

from . import figures
from .numbers import FULL, NOTHING, UNTRAINED, finite, headline, number, plain, ratio, real, seconds, size, smaller, times
from .svg import DARK, LIGHT, svg

if TYPE_CHECKING:
    from ..record import Record

PROOF = ("what", "reader", "result", "tolerance", "reason", "passed")
CAPTIONS = {
    "scores": ("Scores by stage.", "The dashed line is full precision."),
    "training": ("Training.", "Thin: the loss of each step; thick: its moving average; dots: held-out data. Language models: nats a token."),
    "errors": ("Error of the weights, layer by layer.", "How far each layer's quantized weight is from its full-precision master, in depth order."),
    "sizes": ("Size.", "Bytes of each artefact, beside full precision."),
}


def report(record: Record | Sequence[Record], path: str | Path) -> Path:
    """Write the page of one record, or of several, to `path`; aside first, then renamed.

    Returns:
        The path of the page.
    """
    records = list(record) if isinstance(record, Sequence) else [record]
    path = Path(path)
    text = _template().render(runs=[view(each, f"r{n}") for n, each in enumerate(records)], light=LIGHT, dark=DARK)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(text.encode("utf-8", "replace"))
    os.replace(aside, path)
    return path


def view(record: Record, prefix: str) -> dict[str, Any]:
    """Everything the template shows of one record, as plain values; `prefix` keeps ids of several records apart."""
    metric = headline(record)
    failed = [proof for proof in record.proofs if proof.get("passed") is False]
    return {
        "prefix": prefix, "record": record, "title": " · ".join(_title(record)), "metric": metric.name if metric else "score",
        "lower": metric is not None and metric.lower, "stages": _stages(record), "summary": _summary(record), "others": _others(record),
        "figures": [(name, CAPTIONS[name], svg(figures.figure(record, name), figures.describe(record, name), f"{prefix}-{name}"))
                    for name in figures.drawable(record)],
        "proofs": [_proof(proof) for proof in record.proofs], "failed": [plain(proof.get("what", "a comparison")) for proof in failed],
        "coverage": [_row(row) for row in record.coverage], "covered": _covered(record), "signals": [_signal(row) for row in record.signals],
        "samples": record.samples,
        "rules": json.dumps(record.rules, indent=2, default=str, ensure_ascii=False) if record.rules else "", "facts": _facts(record),
    }


def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_clean)
    return environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))


def _clean(value: Any) -> Any:
    """Plain strings without what HTML cannot hold; figures, which are markup, as they are."""
    return plain(value) if type(value) is str else value


def _title(record: Record) -> list[str]:
    asked, mean = record.arguments.get("bits"), f"{number(round(record.bits, 2))} bits a weight" if finite(record.bits) else ""
    bits = f"{asked} bits ({mean} with all that stays full)" if asked is not None and mean else mean
    return [plain(part, 80) for part in (record.paper, record.model, bits, record.target) if part]


def _stages(record: Record) -> list[dict[str, Any]]:
    """Rows of the headline table: the scores in their order, then what has only a size."""
    metric, full = headline(record), record.scores.get(FULL) or {}
    names = [*record.scores, *(name for name in record.sizes if name not in record.scores)]
    rows = []
    for name in names:
        value = (record.scores.get(name) or {}).get(metric.name) if metric else None
        weight = finite(record.sizes.get(name))
        rows.append({
            "name": name, "score": metric.say(value) if metric else NOTHING, "bad": real(value) is not None and finite(value) is None,
            "ratio": NOTHING if name == FULL or metric is None else times(ratio(value, full.get(metric.name))),
            "size": size(weight), "smaller": "" if name == FULL or not weight else smaller(weight, record.sizes.get(FULL)).replace(NOTHING, ""),
            "seconds": seconds(record.times.get(name)),
        })
    return rows


def _summary(record: Record) -> list[str]:
    """The run in a few sentences; each only if its numbers are there."""
    metric, said = headline(record), []
    score = {name: (metrics or {}).get(metric.name) for name, metrics in record.scores.items()} if metric else {}
    share = ratio(score.get("trained"), score.get(FULL))
    if metric and finite(score.get("trained")) is not None:
        said.append(f"{metric.name.capitalize()} {metric.say(score['trained'])} after training"
                    + (f", {times(share)} that of full precision ({metric.say(score[FULL])})" if share is not None else "")
                    + (f"; {metric.say(score[UNTRAINED])} before the first step." if finite(score.get(UNTRAINED)) is not None else "."))
    elif metric and real(score.get("trained")) is not None:
        said.append(f"The trained model's {metric.name} is {metric.say(score['trained'])}: the run went wrong.")
    last = next((name for name in reversed(record.sizes) if name != FULL and finite(record.sizes[name])), None)
    if last and finite(record.sizes.get(FULL)):
        said.append(f"{last}: {size(record.sizes[last])}, {smaller(record.sizes[last], record.sizes[FULL])} than full precision."
                    .replace("same size than", "the same size as"))
    moved, count = (sum(row[i] for row in record.rounded.values()) for i in (0, 1))
    if count:
        most = max(row[2] for row in record.rounded.values())
        said.append(f"The last rounding of the scales to the type that is stored moved {moved:,} of {count:,}"
                    + (f", by at most {100 * most:.2g} %." if moved else "."))
    judged = [proof["passed"] for proof in record.proofs if isinstance(proof.get("passed"), bool)]
    if judged and all(judged):
        said.append({1: "The one proof passed.", 2: "Both proofs passed."}.get(len(judged), f"All {len(judged)} proofs passed."))
    return said


def _others(record: Record) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Names and rows of all metrics, where there is more than the headline."""
    names = list(dict.fromkeys(name for metrics in record.scores.values() for name in metrics or {}))
    if len(names) < 2:
        return [], []
    return names, [(stage, [number((metrics or {}).get(name)) for name in names]) for stage, metrics in record.scores.items()]


def _proof(proof: dict[str, Any]) -> dict[str, Any]:
    passed, more = proof.get("passed"), [f"{key}: {_say(value)}" for key, value in proof.items() if key not in PROOF]
    row = {key: NOTHING if proof.get(key) is None else _say(proof[key]) for key in PROOF[:-1]}
    return row | {"passed": passed if isinstance(passed, bool) else None, "more": more}


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """One row of the coverage; a quantized layer that a probe never called says so."""
    shape, calls = row.get("shape") or (), row.get("calls") or ()
    quantized = any(row.get(slot, "full") != "full" for slot in ("weight", "input"))
    return {"name": row.get("name", ""), "layer": row.get("layer", ""), "shape": " × ".join(str(n) for n in shape), "weight": row.get("weight", ""),
            "input": row.get("input", ""), "bits": number(row.get("bits")), "quantized": quantized,
            "calls": _called(calls, quantized)}


def _signal(row: dict[str, Any]) -> dict[str, Any]:
    """One quantizer inside attention."""
    return {"address": row.get("address", ""), "quant": row.get("quant", ""), "calls": _called(row.get("calls") or (), True)}


def _called(calls: Sequence[int], quantized: bool) -> str:
    return "never called" if quantized and calls and 0 in calls else " / ".join(str(n) for n in calls)


def _covered(record: Record) -> str:
    quantized = sum(_row(row)["quantized"] for row in record.coverage)
    numel = [0 if row.get("tied") else math.prod(row.get("shape") or [0]) for row in record.coverage]
    inside = sum(n for n, row in zip(numel, record.coverage, strict=True) if _row(row)["quantized"])
    return f"{quantized} of {len(record.coverage)} matrices quantized, {100 * inside / max(sum(numel), 1):.1f} % of their weights"


def _facts(record: Record) -> list[tuple[str, list[tuple[str, str]]]]:
    """Titled lists of name and value: arguments, training, times, where it ran, versions."""
    steps = sum(len((fit or {}).get("loss") or []) for fit in record.history)
    items = sum(x for fit in record.history for x in map(finite, (fit or {}).get("tokens") or []) if x is not None)
    spent = sum(x for fit in record.history for x in map(finite, (fit or {}).get("seconds") or []) if x is not None)
    training = [("fits", number(len(record.history)))] * (len(record.history) > 1)
    training += [("steps", number(steps)), ("tokens or items", f"{items:,.0f}"), ("time in steps", seconds(spent))] if steps else []
    training += [("items a second", number(items / spent))] if items and spent else []
    origin = [("model", record.model), ("data", record.data), ("data fingerprint", record.fingerprint), ("target", record.target),
              ("seed", record.seed)]
    ran = [*record.machine.items(), *([("peak memory", size(record.peak_memory))] if record.peak_memory else [])]
    groups = [("Model and data", origin), ("Arguments", list(record.arguments.items())), ("Training", training),
              ("Times", [(name, seconds(x)) for name, x in record.times.items()]), ("Machine", ran), ("Versions", list(record.versions.items()))]
    return [(title, [(name, _say(value)) for name, value in pairs if value not in ("", None) or title == "Arguments"])
            for title, pairs in groups if any(value not in ("", None) for _, value in pairs)]


def _say(value: Any) -> str:
    """Any value of a record for people."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else number(value)
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
