"""What fake quantization of one weight costs, beside copying it: ours and the peers', forward and backward, in one run.

    python benchmarks/fake.py --json fake.json [--pairs 20] [--threads 2] [--page docs/performance.md]

A weight of 4096 x 4096 in fp32 is quantized to 4 bits, groups of 128, and a gradient of its size comes back. Torch copies the weight into memory
that is there already: the limit, since whoever quantizes must read it and write as much. A round runs every variant once, forward and backward, and
the copy before each of them; a pair is a variant's and its copy's seconds. Told is the median of the pairs' ratios with its interval by order
statistics (see training.py). The allocator is the default one unless the environment says otherwise, and what it is stands above the table.

    ours        learned steps (LSQ), the kept buffer of `keep="buffer"`; eager, and with `compile="quant"`, which makes one pass of each direction
    torchao     IntxFakeQuantizer, steps by the largest value, eager and compiled; with learned steps where it has them
    modelopt    TensorQuantizer by blocks, steps measured before      brevitas   by channel, learned
    torch       its own operators, by channel: they know no groups

"Saved" is what a forward keeps for its backward: the bytes of all storages that autograd packs, as multiples of the weight's, the weight itself
counted. A variant that is absent or fails stands in the table with its reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from torch import Tensor, nn
from training import interval, say, setting, write

MARK, SIZE, GROUP, BITS = "fake-cost", 4096, 128, 4

Fake = Callable[[Tensor], Tensor]
Make = Callable[[Tensor, ExitStack], tuple[Fake, Sequence[Tensor]]]        # the function, and what learns besides the weight


def ours(compile: bool) -> Make:
    def make(w: Tensor, stack: ExitStack) -> tuple[Fake, Sequence[Tensor]]:
        from qatlas.core.scheme import scheme
        from qatlas.kernels.compiled import compiled
        from qatlas.layers.linear import QLinear
        from qatlas.layers.quantized import Slots

        linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
        linear.weight = w  # type: ignore[assignment]
        layer = QLinear.of(linear, Slots(weight=scheme(f"w{BITS}-g{GROUP}").weight, keep="buffer"))
        stack.enter_context(compiled(layer)) if compile else None

        def fake(_: Tensor) -> Tensor:
            layer.refresh()                                       # as after a step: the weight was written
            return layer.computed()

        return fake, list(layer.weight_quantizer.parameters())
    return make


def torchao(compile: bool, learned: bool = False) -> Make:
    def make(w: Tensor, stack: ExitStack) -> tuple[Fake, Sequence[Tensor]]:
        from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

        more = {"is_dynamic": False, "range_learning": True} if learned else {}
        module = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, group_size=GROUP, **more))
        module(w.detach())
        module.compile(dynamic=True) if compile else None
        return module, list(module.parameters())
    return make


def modelopt(w: Tensor, stack: ExitStack) -> tuple[Fake, Sequence[Tensor]]:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    module = TensorQuantizer(QuantizerAttributeConfig(num_bits=BITS, block_sizes={-1: GROUP}))
    module(w.detach())
    return module, ()


def brevitas(w: Tensor, stack: ExitStack) -> tuple[Fake, Sequence[Tensor]]:
    import brevitas.nn as qnn
    from brevitas.quant import Int8WeightPerChannelFloat

    made = qnn.QuantLinear(w.shape[1], w.shape[0], bias=False, weight_quant=Int8WeightPerChannelFloat, weight_bit_width=BITS)
    made.weight = w
    return lambda _: made.quant_weight().value, [p for p in made.parameters() if p is not w]


def affine(w: Tensor, stack: ExitStack) -> tuple[Fake, Sequence[Tensor]]:
    scale, zero = w.detach().abs().amax(1) / 7, torch.zeros(w.shape[0], dtype=torch.int32)
    return lambda w: torch.fake_quantize_per_channel_affine(w, scale, zero, 0, -8, 7), ()


def learnable(w: Tensor, stack: ExitStack) -> tuple[Fake, Sequence[Tensor]]:
    scale, zero = (w.detach().abs().amax(1) / 7).requires_grad_(), torch.zeros(w.shape[0])
    return lambda w: torch._fake_quantize_learnable_per_channel_affine(w, scale, zero, 0, -8, 7, 1.0), [scale]


VARIANTS: dict[str, Make] = {
    "qatlas": ours(False), "qatlas, compiled": ours(True), "torchao": torchao(False), "torchao, compiled": torchao(True),
    "torchao, learned steps": torchao(False, True), "modelopt": modelopt, "brevitas": brevitas, "torch, per channel": affine,
    "torch, per channel, learned": learnable}


class Subject:
    """A variant on a weight of its own. A turn is forward and backward; gradients are dropped after it, as an optimizer does, outside of the time."""

    def __init__(self, make: Make, stack: ExitStack, size: int) -> None:
        self.w = nn.Parameter(torch.randn(size, size, generator=torch.Generator().manual_seed(0)) * 0.02)
        self.fake, self.learned = make(self.w, stack)

    def turn(self, g: Tensor) -> tuple[float, float]:
        """Seconds of the forward, and of both."""
        began = time.perf_counter()
        y = self.fake(self.w)
        middle = time.perf_counter()
        y.backward(g)
        ended = time.perf_counter()
        for p in (self.w, *self.learned):
            p.grad = None
        return middle - began, ended - began

    def saved(self) -> float:
        """Bytes kept for backward, as multiples of the weight's."""
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            self.fake(self.w)
        return sum(kept.values()) / self.w.nbytes


def measure(state: dict[str, Any], pairs: int, names: Sequence[str], save: Callable[[], None], size: int) -> None:
    """Rounds until there are so many pairs; `state` is filled as they come."""
    with ExitStack() as stack:
        source, target = torch.randn(size, size), torch.zeros(size, size)
        subjects: dict[str, Subject] = {}
        for name in names:
            say(name)
            try:
                subject = Subject(VARIANTS[name], stack, size)
                for _ in range(3):
                    subject.turn(source)
                state["saved"][name] = subject.saved()
                subjects[name] = subject
                state["absent"].pop(name, None)
            except Exception as error:                            # a peer that is not there or does not run: its reason is its row
                if name.startswith("qatlas"):
                    raise
                state["absent"][name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
        for number in range(len(state["rounds"]), pairs):
            order = list(subjects)
            order = order[number % len(order):] + order[: number % len(order)]
            round_ = {}
            for name in order:
                began = time.perf_counter()
                target.copy_(source)
                copied = time.perf_counter() - began
                round_[name] = (copied, *subjects[name].turn(source))
            state["rounds"].append(round_)
            save()


def table(state: dict[str, Any]) -> str:
    """The page's table."""
    rows = ["| | forward | 95 % interval | forward and backward | 95 % interval | saved |", "|---|---|---|---|---|---|"]
    for name in VARIANTS:
        pairs = [r[name] for r in state["rounds"] if name in r]
        if name in state["absent"] or not pairs:
            rows.append(f"| {name} | absent: {state['absent'].get(name, 'not measured')} | | | | |")
            continue
        (f, fl, fh), (b, bl, bh) = (interval([p[i] / p[0] for p in pairs]) for i in (1, 2))
        rows.append(f"| {name} | {f:.2f} | {fl:.2f} to {fh:.2f} | {b:.2f} | {bl:.2f} to {bh:.2f} | {state['saved'][name]:.2f} |")
    copies = sorted(p[0] for r in state["rounds"] for p in r.values())
    rows.append(f"| copying it, the limit | 1 ({copies[len(copies) // 2] * 1e3:.1f} ms) | | | | |")
    return "\n".join(rows) + "\n"


def section(state: dict[str, Any]) -> str:
    """The part of the page."""
    how = state["setting"]
    return (f"## Fake quantization of one weight\n\n`python benchmarks/fake.py --json fake.json --pairs {len(state['rounds'])} --threads "
            f"{how['threads']} --page docs/performance.md`.\n\n{how['size']} x {how['size']} in fp32, {BITS} bits, groups of {GROUP}; threads: "
            f"{how['threads']} ({how['cpu']}), allocator: {how['allocator']}.\n"
            f"{', '.join(f'{k} {v}' for k, v in how['versions'].items())}. Multiples of copying the weight into memory that is there,\n"
            f"medians of {len(state['rounds'])} interleaved pairs; saved bytes as multiples of the weight's. brevitas and torch's own operators\n"
            f"have one step a channel. Ours learns its steps.\n\n{table(state)}")


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, type=Path, help="what was measured; a run that was stopped goes on from it")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of each variant")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="which to measure")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--size", type=int, default=SIZE, help="rows and columns of the weight")
    parser.add_argument("--page", type=Path, help="the page that gets the section; without it the section is only printed")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    how = {**setting(given.threads, given.size**2), "size": given.size}
    state = json.loads(given.json.read_text()) if given.json.exists() else {"setting": how, "rounds": [], "saved": {}, "absent": {}}
    if state["setting"] != how:
        changed = [key for key in how if state["setting"].get(key) != how[key]]
        raise SystemExit(f"{given.json} was measured with other {', '.join(changed)}; take another file")

    def save() -> None:
        aside = given.json.with_suffix(".new")
        aside.write_text(json.dumps(state, indent=1))
        aside.replace(given.json)

    if len(state["rounds"]) < given.pairs:
        measure(state, given.pairs, given.variants, save, given.size)
    made = section(state)
    if given.page:
        write(given.page, made, MARK)
    print(made)
    return made


if __name__ == "__main__":
    main()
