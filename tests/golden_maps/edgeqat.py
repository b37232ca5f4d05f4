"""EdgeQAT: learned steps of weights and activations, and the whole loss.

Theirs sums inside the logarithms where ours takes means: the gradients are the same, the values of the losses are not."""

from __future__ import annotations

from golden_cases import Answer, Case
from golden_means import fake, layer

from qatlas.core.estimator import Clip
from qatlas.core.grain import PerChannel, PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import Learned
from qatlas.papers.edgeqat import chorus, guided, of_input

LACKS = {"q"}                                                     # an input that is called like an output


def edgeqat(c: Case) -> Answer:
    p = c.p
    if c.kind.startswith("linear"):
        grain = PerTensor() if p["mode"] == "layer_wise" else PerChannel()
        return layer(c, Quant(Uniform(p["nbits_w"]), grain, Learned(over="tensor"), Clip()), None, scale="alpha")
    if c.kind.startswith("act"):
        return fake(c, of_input(p["nbits_a"], bool(c.a["signed"].item())), "x", scale="alpha", zero="zp")
    if c.kind.startswith("lsq"):
        grid = Uniform(p["bit"], not p.get("all_positive", False), narrow=p.get("symmetric", False))
        return fake(c, Quant(grid, PerChannel() if p.get("per_channel") else PerTensor(), Learned(over="tensor"), Clip()), scale="alpha")
    leaves = {name: c.a[name].clone().requires_grad_() for name in ("q", "k", "attn", "logits")}
    said = chorus(list(c.a["t_logits"]))
    total = guided(c.a["ce"], leaves["logits"], said, list(leaves["q"]), list(leaves["k"]), list(leaves["attn"]), list(c.a["t_attn"]),
                   distil=p["alpha"], temperature=p["temperature"], entropy=p["loss_entropy_ratio"], distribution=p["loss_attn_ratio"],
                   form="published" if p["published_sign"] else "log", summed=True)
    total.backward()
    return {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
