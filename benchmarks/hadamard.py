"""What QuEST's rotation costs: a step of QuEST with it, divided by the same step without it, in one run.

    python benchmarks/hadamard.py --json hadamard.json [--pairs 20] [--threads 2] [--bits 4] [--clock wall] [--page docs/performance.md]

The model, the batch, the rounds and the interval are those of benchmarks/training.py: a Llama of 17.3 million parameters, 2,048 tokens a step, AdamW,
fp32 on CPU, weights kept over the step. Three trainees stand in one process: plain, QuEST without a rotation, and QuEST, weights and inputs in as
many bits. A round steps each of them once, in an order that rotates; a pair is the two QuESTs' steps of one round. The claim is of a pair's ratio
less one: the rotation of all weights and inputs, forward and backward, at most a tenth of the step. Beside it stands the price of QuEST as a whole,
against the plain step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training import Build, Trainee, interval, llama, plain, say, setting, write

from qatlas.core.grain import PerChannel, PerToken
from qatlas.core.transform import Hadamard
from qatlas.model.roles import Role
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.papers.quest import gaussian

MARK, CLAIM = "hadamard-cost", 1.10


def of_quest(bits: int, block: int | None) -> Build:
    """QuEST's numbers as `fit` runs them."""

    def build(model: nn.Module, stack: ExitStack) -> nn.Module:
        rule = Rule("*", weight=gaussian(bits, PerChannel()), input=gaussian(bits, PerToken()), keep="buffer",
                    transform=None if block is None else Hadamard(most=block))
        return quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD), rule])

    return build


def measure(found: list[dict[str, Any]], pairs: int, bits: int, save: Any, model: Any = llama) -> None:
    """Rounds until there are so many."""
    if len(found) >= pairs:
        return
    builds = {"plain": plain, "no rotation": of_quest(bits, None), "QuEST": of_quest(bits, 128)}
    with ExitStack() as stack:
        trainees = {name: Trainee(build, stack, model()) for name, build in builds.items()}
        for number in range(2):                                   # moments exist, kept weights lie
            for trainee in trainees.values():
                trainee.step(number)
        for number in range(len(found), pairs):
            names = list(trainees)
            names = names[number % len(names):] + names[: number % len(names)]
            found.append({name: trainees[name].step(number + 2) for name in names})
            save()
            say(f"round {number + 1} of {pairs}, plain {found[-1]['plain'][0]:.2f} s")


def section(state: dict[str, Any], clock: str) -> str:
    """The part of the page."""
    rounds, how, at = state["rounds"], state["setting"], int(clock == "cpu")
    rows = ["| | time | 95 % interval |", "|---|---|---|"]
    for name, one, other in (("QuEST / QuEST without rotation", "QuEST", "no rotation"), ("QuEST without rotation / plain", "no rotation", "plain"),
                             ("QuEST / plain", "QuEST", "plain")):
        middle, low, high = interval([r[one][at] / r[other][at] for r in rounds])
        rows.append(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    high = interval([r["QuEST"][at] / r["no rotation"][at] for r in rounds])[2]
    return (f"## QuEST's rotation\n\n`python benchmarks/hadamard.py --json hadamard.json --pairs {len(rounds)} --threads {how['threads']}"
            f"{' --clock cpu' if clock == 'cpu' else ''} --page docs/performance.md`.\n\n"
            f"Weights and inputs in {state['bits']} bits, rotated in blocks of 128; a Llama with {how['parameters']:,} parameters "
            f"on {how['tokens']:,} tokens, fp32,\n{how['optimizer']}, threads: {how['threads']} ({how['cpu']}); {len(rounds)} interleaved pairs, "
            "medians of ratios of "
            f"{'CPU seconds' if at else 'seconds of the clock'}.\n"
            f"The claim, at most {CLAIM - 1:.0%} for the rotation, {'holds' if high <= CLAIM else 'does not hold'} (the interval's upper end).\n\n"
            + "\n".join(rows) + "\n")


def main(arguments: Sequence[str] | None = None, model: Any = llama) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, type=Path, help="what was measured; a run that was stopped goes on from it")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine that others use, with one thread")
    parser.add_argument("--page", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    how = setting(given.threads, sum(p.numel() for p in model().parameters()))
    state = json.loads(given.json.read_text()) if given.json.exists() else {"setting": how, "bits": given.bits, "rounds": []}
    if (state["setting"], state["bits"]) != (how, given.bits):
        raise SystemExit(f"{given.json} was measured with other settings; take another file")
    measure(state["rounds"], given.pairs, given.bits, lambda: given.json.write_text(json.dumps(state, indent=1)), model)
    made = section(state, given.clock)
    if given.page:
        write(given.page, made, MARK)
    print(made)
    return made


if __name__ == "__main__":
    main()
