"""The trainings of test_ranks.py, each run in one process and in two (ranks_run.py)."""

import contextlib
import os

import torch
from tiny import llama, quantized, task
from torch import nn

from qatlas.core.error import RunError
from qatlas.core.grain import PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, Moving
from qatlas.layers.adapter import Lora
from qatlas.layers.frozen import Cast, Places
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Quantized, Slots
from qatlas.model.pack import pack
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.papers.l4q import of_weight as l4q_weight
from qatlas.papers.lr_qat import of_weight as places_weight
from qatlas.train.evaluate import evaluate
from qatlas.train.fit import fit
from qatlas.train.imitate import Imitation
from qatlas.train.optim import SGD, AdamW, BertAdam
from qatlas.train.run import Run
from qatlas.train.tactic import Freeze, Tactic
from qatlas.train.teacher import Distil, SelfTeacher, Teacher

WAYS = ("ddp", "fsdp2")
STEPS, KILLED = 4, 2


class Pull(Tactic):
    """Draw each weight to what its layer computes with: it reads whole rows and writes between steps."""

    pieces = True

    def __init__(self, strength=0.1):
        self.strength = strength

    def grads(self, loop):
        with torch.no_grad():
            for weight, hard, _ in loop.quantized():
                weight.grad.add_(weight - hard, alpha=self.strength)


class Stop(Tactic):
    """Break the run off at the beginning of a step, on every rank."""

    pieces = True

    def __init__(self, step):
        self._step = step

    def before(self, loop):
        if loop.step == self._step:
            raise RunError("broken off")


def told(model, history):
    """The losses, then the score of the model as it is and packed: it is whole and plain after a fit."""
    subject = task()
    return [*history.loss, evaluate(model, subject)["loss"], evaluate(pack(model), subject)["loss"]]


def plain(text, keep="each", optimizer=SGD(0.05), tactics=(), micro=2, steps=STEPS, clip=1.0):
    """A fit of five rows a step, which two ranks share as two and three."""
    subject = task(batch=5, run=Run(micro=micro, progress=False))
    model = quantized(llama(), text, keep=keep)
    subject.calibrate(model, 2)
    return told(model, fit(model, subject, steps=steps, optimizer=optimizer, tactics=tactics, clip=clip))


def lowrank(**slots):
    """Adapters and steps alone; the weights are frozen stores, which no process cuts or sends."""
    subject = task(batch=5, run=Run(micro=2, progress=False))
    model = quantize(llama(), [*keep_full("@embedding", "@head"), Rule("*", keep="recompute", **slots)])
    train = ("*.adapter.*", "*.weight_quantizer.*")
    return told(model, fit(model, subject, steps=STEPS, optimizer=AdamW(1e-2, scale_share=1e-2), train=train))


def taught(teacher, share=1.0):
    subject = task(batch=5, run=Run(micro=2, progress=False))
    model = quantized(llama(), "w4")
    source = SelfTeacher(model) if teacher == "self" else Teacher(llama(seed=1))
    return told(model, fit(model, subject, steps=STEPS, optimizer=SGD(0.05), loss=Distil(subject, source, share=share)))


def imitated():
    """A loss that reads inside the blocks."""
    subject, model = task(batch=5, run=Run(micro=2, progress=False)), quantized(llama(), "w4")
    loss = Imitation(subject, Teacher(llama(seed=1)), model, scores=1.0, hidden=1.0)
    return told(model, fit(model, subject, steps=STEPS, optimizer=SGD(0.5), loss=loss))


def twice():
    """Two fits, the second of scales and norms alone; parameters, classes and hooks are those of before."""
    subject, model = task(batch=5, run=Run(progress=False)), quantized(llama(), "w4", keep="buffer")
    model.lm_head.weight = model.model.embed_tokens.weight        # tied
    before = {name: id(p) for name, p in model.named_parameters()}
    state = [(type(m), sorted(vars(m)), sum(len(t) for n, t in vars(m).items() if "_hooks" in n)) for m in model.modules()]
    one = fit(model, subject, steps=2, optimizer=SGD(0.05))
    two = fit(model, subject, steps=2, optimizer=AdamW(1e-3, scale_share=1e-3), train=["*scale", "*norm*"])
    assert before == {name: id(p) for name, p in model.named_parameters()} and model.lm_head.weight is model.model.embed_tokens.weight
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        assert state == [(type(m), sorted(vars(m)), sum(len(t) for n, t in vars(m).items() if "_hooks" in n)) for m in model.modules()]
    assert {m.keep for m in model.modules() if isinstance(m, Quantized)} == {"buffer"}
    return [*one.loss, *told(model, two)]


def halted(out, resume=False, broken=True, save=KILLED):
    """A run that is broken off after its point, or goes on from there."""
    with contextlib.suppress(RunError) if broken else contextlib.nullcontext():
        subject = task(batch=5, run=Run(out, resume=resume, save_every=save, progress=False))
        model = quantized(llama(), "w4-g8")
        history = fit(model, subject, steps=STEPS, optimizer=AdamW(1e-2, 0.1), tactics=[Stop(KILLED + 1 if broken else STEPS)])
        return told(model, history)
    return None


CASES = {
    "channel": lambda: plain("w4"),
    "group": lambda: plain("w4-g8"),
    "inputs": lambda: plain("w4a8"),
    "static": lambda: plain("w4a8-static"),
    "tensor": lambda: plain("w1.58-tensor"),
    "buffer": lambda: plain("w4-g8", keep="buffer"),
    "recompute": lambda: plain("w4", keep="recompute"),
    "places": lambda: lowrank(weight=places_weight(3, None, True, None), adapter=Lora(2, 2.0, "shift"), frozen=Places()),
    "l4q": lambda: lowrank(weight=l4q_weight(3, None, "covering", True, False, None), adapter=Lora(2, 4.0), frozen=Cast("bfloat16")),
    "whole": lambda: plain("w4", micro=None, optimizer=AdamW(1e-3, 0.1, scale_share=1e-3), clip=None),
    "tactics": lambda: plain("w4", tactics=[Pull(), Freeze(0.5)], optimizer=BertAdam(1e-3), clip=1e-2),
    "teacher": lambda: taught("other"),
    "self": lambda: taught("self", share=0.5),
    "inside": imitated,
    "twice": twice,
}


class Silent(Tactic):
    pass


def refusal(act):
    try:
        act()
    except RunError as error:
        return str(error)
    return ""


def refused():
    """What FSDP2 refuses; the model is as it was."""
    subject = task(batch=5)
    normed = llama()
    normed.extra = nn.BatchNorm1d(2)
    moving = llama()
    attention = moving.model.layers[0].self_attn
    attention.q_proj = QLinear.of(attention.q_proj, Slots(None, Quant(Uniform(8), PerTensor(), Moving(AbsMax()))))
    tied = llama()
    tied.model.layers[1].mlp = tied.model.layers[0].mlp
    found = {name: refusal(lambda m=m, t=t: fit(m, subject, steps=1, tactics=t))
             for name, (m, t) in {"batch norm": (normed, ()), "moving": (moving, ()), "tied": (tied, ()), "tactic": (llama(), [Silent()])}.items()}
    student = quantized(llama(), "w4")
    found["inside"] = refusal(lambda: fit(student, subject, steps=1, loss=Imitation(subject, Teacher(llama(1)), student, logits=0.0, scores=1.0)))
    assert all(type(p) is nn.Parameter for p in student.parameters())
    for name, value in (("VERSION", "1"), ("OFFLOAD_PARAMS", "true"), ("RESHARD_AFTER_FORWARD", "false"), ("CPU_RAM_EFFICIENT_LOADING", "true")):
        with environment({f"FSDP_{name}": value}):
            found[name] = refusal(lambda: fit(llama(), subject, steps=1))
    return found


@contextlib.contextmanager
def environment(values):
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
