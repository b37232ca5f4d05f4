"""`--plan` against the run itself: seconds up to the trained model, and the largest memory, each in a process of its own.

    python runs/plan_check.py [--rounds 3] [--page docs/results.md]

Plan and run take turns, so that a machine that others use, too, is unfair to both. What is compared is what a plan speaks of: loading, judging and
training, not packing, saving and reading back (the last column is the whole run, without an export).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pages import between

ZOO = {"model": "zoo:gpt", "data": "builtin:docs"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {                # name -> paper, its arguments, the job
    "LSQ, 4 bits": ("lsq", {"bits": 4, "steps": 40}, ZOO),
    "LSQ, 2 bits, 8-bit inputs, taught, judged each 10 steps": (
        "lsq", {"bits": 2, "input_bits": 8, "distil": True, "steps": 40}, ZOO | {"watch": 10}),
    "ParetoQ, 2 bits, micro-batches of 2": ("paretoq", {"bits": 2, "steps": 40}, ZOO | {"micro": 2}),
    "Teacher Intervention": ("teacher_intervention", {"steps": 40, "first": 10}, ZOO),
    "BitNet, from scratch, SubLN": ("bitnet", {"scratch": True, "sub_norm": True, "steps": 40}, ZOO),
}
STAGES = ("load", "full precision", "trained")
CHILD = """
import json, sys
from qatlas.job import plan, run
from qatlas.prepare import Job
kind, paper, arguments, job, stages = json.loads(sys.argv[1])
if kind == "plan":
    found = plan(paper, arguments, Job(**job))
    print(json.dumps([found["seconds"], found["peak memory"], found["peak memory"]]))
else:
    record = run(paper, arguments, Job(**job)).record
    print(json.dumps([sum(record.times[stage] for stage in stages), record.memory["trained"], record.peak_memory]))
"""


def one(kind: str, name: str) -> tuple[float, float, float]:
    """Seconds, bytes up to the trained model, bytes in all."""
    paper, arguments, job = CASES[name]
    with tempfile.TemporaryDirectory() as out:
        told = json.dumps([kind, paper, arguments, job | {"out": f"{out}/run", "target": None}, STAGES])
        done = subprocess.run([sys.executable, "-c", CHILD, told], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} of {name} failed:\n{done.stderr[-3000:]}")
    seconds, trained, whole = json.loads(done.stdout.splitlines()[-1])
    return seconds, trained, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--page", help="the file whose section is made anew")
    given = parser.parse_args()
    lines = ["| | seconds, planned | seconds, run | plan / run | MiB, planned | MiB, run | plan / run | MiB, whole run |", "|---" * 8 + "|"]
    for name in CASES:
        both = [(one("plan", name), one("run", name)) for _ in range(given.rounds)]
        planned, done = ([statistics.median(pair[side][i] for pair in both) for i in range(3)] for side in (0, 1))
        ratios = [statistics.median(pair[0][i] / pair[1][i] for pair in both) for i in range(2)]
        lines.append(f"| {name} | {planned[0]:.1f} | {done[0]:.1f} | {ratios[0]:.2f} | {planned[1] / 2**20:,.0f} | {done[1] / 2**20:,.0f} | "
                     f"{ratios[1]:.2f} | {done[2] / 2**20:,.0f} |")
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    if given.page:
        page = Path(given.page)
        page.write_text(between(page.read_text(), "plans", text))


if __name__ == "__main__":
    main()
