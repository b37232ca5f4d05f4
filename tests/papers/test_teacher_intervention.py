"""Teacher Intervention: the exact checks of its sheet (section 6), on four kinds of models."""

from types import SimpleNamespace

import pytest
import torch
from sentences import bert, gpt2, pair, sentences
from tiny import llama as tiny_llama
from tiny import task as text

from qatlas.core.error import CheckpointError, RuleError, RunError
from qatlas.model import signals
from qatlas.model.taps import read
from qatlas.papers.teacher_intervention import POINTS, Intervened, Intervention, stops, teacher_intervention, turn
from qatlas.papers.ternarybert import ternarize
from qatlas.train.imitate import Imitation, find
from qatlas.train.run import Run
from qatlas.train.tactic import Tactic
from qatlas.train.teacher import SelfTeacher, Teacher, full_precision

PLAIN = {"loss_aware": False, "rows": False, "embeddings": None, "input_bits": 8, "minmax": False, "per_token": None, "clip": 2.5}
TERMS = {"hidden": 1.0, "scores": 1.0, "attended": 1.0}
KINDS = ["bert", "vit", "llama", "gpt2"]


def made(kind, tmp_path, at, **terms):
    """Model (quantized), task, teacher, loss; GPT-2's map cannot be replaced."""
    if (kind, at) == ("gpt2", "map"):
        pytest.skip("one matrix makes Q, K and V: refused, see below")
    model, task = pair(kind, tmp_path)
    teacher = Teacher.of(model)
    ternarize(model, task, **PLAIN)
    return model, task, teacher, Intervened(task, teacher, model, at, **(terms or TERMS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", POINTS)
def test_check_1_without_quantizers_nothing_moves(kind, at, tmp_path):
    model, task, teacher, loss = made(kind, tmp_path, at)
    batch = task.batch(0)
    with full_precision(model), torch.no_grad():
        said, theirs = teacher.signals(task, batch, loss.read())
        logits, _ = loss.forward(model.eval(), batch, theirs)
    torch.testing.assert_close(logits, said, rtol=1e-4, atol=1e-5)


PARTS = {"output": ("query", "key", "value", "out"), "context": ("query", "key", "value"), "map": ("query", "key")}
NAMES = {"bert": {"query": "self.query", "key": "self.key", "value": "self.value", "out": "attention.output.dense"},
         "vit": {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"},
         "llama": {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}}


@pytest.mark.parametrize("kind", list(NAMES))
@pytest.mark.parametrize("at", POINTS)
@torch.no_grad()
def test_check_2_what_is_replaced_is_replaced(kind, at, tmp_path):
    model, task, teacher, loss = made(kind, tmp_path, at)
    batch = task.batch(0)
    _, theirs = teacher.signals(task, batch, loss.read())
    before, _ = loss.forward(model.eval(), batch, theirs)
    weights = {name: p for name, p in model.named_parameters() if name.endswith("weight")}
    for part, name in NAMES[kind].items():
        for p in (p for full, p in weights.items() if f"{name}." in full):
            p.mul_(-3.0).add_(torch.randn_like(p))
        after, _ = loss.forward(model, batch, theirs)
        assert torch.equal(after, before) == (part in PARTS[at]), (part, at)
        before = after


@pytest.mark.parametrize("kind", list(NAMES))
@pytest.mark.parametrize("at", [*POINTS, "none"])
@pytest.mark.parametrize("before_norm", [False, True])
def test_check_3_the_table_of_gradients(kind, at, before_norm, tmp_path):
    """Which weights hear which losses, parameter by parameter."""
    terms = {"hidden": 1.0, "scores": 1.0, "projected" if before_norm else "attended": 1.0}
    model, task, teacher, loss = made(kind, tmp_path, "output", **terms)
    loss = Imitation(task, teacher, model, **terms) if at == "none" else Intervened(task, teacher, model, at, **terms)
    batch = task.batch(0)
    said, theirs = teacher.signals(task, batch, loss.read())
    logits, own = loss.forward(model.train(), batch, theirs)
    parts = loss.terms(batch, logits, own, said, theirs)
    scores = {name: p for name, p in own.items() if name.endswith(":scores")}
    alone = [torch.nn.functional.mse_loss(*(x.masked_fill(x <= -100, 0) for x in (scores[a], theirs[a]))) for a in loss.addresses["scores"]]
    named = dict(model.named_parameters())

    def grads(value):
        found = torch.autograd.grad(value, list(named.values()), retain_graph=True, allow_unused=True)
        return {name: g for name, g in zip(named, found, strict=True) if g is not None and bool(g.any())}

    whole, rest = grads(sum(parts.values())), grads(sum(value for name, value in parts.items() if name != "scores"))
    layers = [grads(value) for value in alone]

    def weight(layer, part):
        return next(n for n in named if f".{layer}." in n and n.endswith(f"{NAMES[kind][part]}.weight"))

    for layer in (0, 1):
        for part in ("query", "key"):
            name = weight(layer, part)
            lonely = at in ("context", "map") or (at == "output" and not before_norm)
            assert name in whole and (name in rest) != lonely, "Q and K hear the scores of their own layer only"
            if lonely:
                torch.testing.assert_close(whole[name], layers[layer][name])
        heard = {"output": before_norm, "context": False, "map": True, "none": True}[at]
        assert (weight(layer, "value") in whole) == heard
        assert (weight(layer, "out") in whole) == ({"output": before_norm}.get(at, True))
    below = {name for name in layers[1] if ".0." in name or "embed" in name}
    assert bool(below) == (at == "none"), "a layer's score loss reaches nothing below it"
    feed = [n for n in named if n.endswith(("intermediate.dense.weight", "mlp.up_proj.weight", "mlp.fc1.weight"))]
    assert feed and all(n in whole for n in feed)


def test_check_4_whose_turn_it_is():
    assert [turn("gradual", g, 60) for g in (0, 9, 10, 19, 20, 59)] == ["output", "output", "context", "context", "map", "map"]
    assert [turn("inverted", g, 60) for g in (0, 19, 20, 39, 40, 59)] == ["map", "map", "context", "context", "output", "output"]
    drawn = [turn("stochastic", g, 900, seed=1) for g in range(900)]
    assert drawn == [turn("stochastic", g, 900, seed=1) for g in range(900)] and all(250 < drawn.count(point) < 350 for point in POINTS)
    with pytest.raises(RunError, match="graduall.*nearest|gradual"):
        turn("graduall", 0, 1)


def test_check_5_without_first_steps_and_output_loss_it_is_ternarybert():
    from qatlas.papers.ternarybert import ternarybert

    one, other = teacher_intervention(bert(), sentences(), first=0, output=0.0, steps=4, lr=1e-3), ternarybert(bert(), sentences(), steps=4, lr=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    third = teacher_intervention(bert(), sentences(), first=0, steps=4, lr=1e-3)
    assert not all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), third.state_dict().values(), strict=True))


def test_the_two_parts_have_their_own_schedule_and_the_data_goes_on(monkeypatch):
    task = sentences(Run(progress=False))
    seen = []
    take = type(task).take

    def look(self, index, step):
        seen.append(tuple(index))
        return take(self, index, step)

    monkeypatch.setattr(type(task), "take", look)
    teacher_intervention(bert(), task, first=2, first_lr=4e-3, steps=6, lr=1e-3, warmup=0.0)
    first, second = task.run.histories
    assert len(first.loss) == 2 and len(second.loss) == 4
    assert first.lr == pytest.approx([3e-3, 1e-3]) and second.lr == pytest.approx([1e-3 * f for f in (7 / 8, 5 / 8, 3 / 8, 1 / 8)])
    plain = sentences()
    wanted = [plain.batch(step)["labels"].tolist() for step in range(6)]
    again = [*(task.batch(step)["labels"].tolist() for step in range(2)), *(task.later(2).batch(step)["labels"].tolist() for step in range(4))]
    assert again == wanted and task.later(2).fingerprint != task.fingerprint and task.later(0).fingerprint == task.fingerprint


@pytest.mark.parametrize("mode", ["gradual", "output", "context", "map", "inverted", "stochastic", "none"])
def test_every_mode_trains(mode):
    task = text(run=Run(progress=False))
    model = teacher_intervention(tiny_llama(), task, mode=mode, first=6, steps=8, lr=1e-3)
    assert all(p.isfinite().all() for p in model.parameters()) and [len(h.loss) for h in task.run.histories] == [6, 2]


def test_a_wrong_mode_and_too_many_first_steps_fail_before_anything_moves():
    with pytest.raises(RunError, match="at least one"):
        teacher_intervention(bert(), sentences(), first=4, steps=4)
    with pytest.raises(RunError, match="gradual"):
        teacher_intervention(bert(), sentences(), mode="grad", first=1, steps=4)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="gradual"):
        teacher_intervention(bert(), sentences(), mode="grad", first=0, steps=4)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="probabilities|map"):
        Intervened(sentences(), Teacher(bert()), bert(), "probs")


def test_gpt2s_map_is_refused_and_its_output_is_not():
    assert stops(gpt2(), "output") == ["transformer.h.0.attn.c_attn:input", "transformer.h.1.attn.c_attn:input"]
    with pytest.raises(RuleError, match=r"c_attn.*cannot be told apart"):
        teacher_intervention(gpt2(), text(), mode="map", first=1, steps=2)
    task = text(run=Run(progress=False))
    teacher_intervention(gpt2(), task, mode="output", first=2, steps=4)
    assert len(task.run.histories) == 2


@pytest.mark.parametrize(("at", "only"), [("map", "attention.self"), ("output", "attention.output.dropout")])
def test_dropout_reaches_what_is_put_in(at, only):
    """The student's own dropout acts on the teacher's map and output, as in the authors' code; no other dropout is on here."""
    model = bert(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    task, teacher = sentences(), Teacher.of(model)
    ternarize(model, task, **PLAIN)
    loss = Intervened(task, teacher, model.train(), at, **TERMS)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and only not in name:
            module.p = 0.0
    _, theirs = teacher.signals(task, task.batch(0), loss.read())
    with torch.no_grad():
        a, b = (loss.forward(model.train(), task.batch(0), theirs)[0] for _ in "ab")
    assert not torch.equal(a, b)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        a, b = (loss.forward(model.train(), task.batch(0), theirs)[0] for _ in "ab")
    assert torch.equal(a, b)


def test_the_student_can_be_its_own_teacher():
    model, task = bert(), sentences()
    ternarize(model, task, **PLAIN)
    loss = Intervened(task, SelfTeacher(model), model, "map", **TERMS)
    loss(model.train(), task.batch(0)).backward()
    assert model.training and model.bert.pooler.dense.weight.grad is not None


def test_gradient_checkpointing_gives_the_same_gradients():
    def grads(checkpointed):
        model, task = bert(), sentences()
        teacher = Teacher.of(model)
        ternarize(model, task, **PLAIN)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        Intervened(task, teacher, model, "map", **TERMS)(model.train(), task.batch(0)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, again = grads(False), grads(True)
    assert set(plain) == set(again)
    for name, g in plain.items():
        torch.testing.assert_close(again[name], g)


def test_what_the_losses_read_is_the_students_own():
    model, task = bert(), sentences()
    teacher = Teacher.of(model)
    ternarize(model, task, **PLAIN)
    loss = Intervened(task, teacher, model, "output", **TERMS, projected=1.0)
    batch = task.batch(0)
    _, theirs = teacher.signals(task, batch, loss.read())
    with torch.no_grad():
        _, own = loss.forward(model.eval(), batch, theirs)
        address = find(model, "projected")[0]
        with read(model, address) as plain:
            model(**{k: v for k, v in batch.items() if k != "labels"})
    assert torch.equal(own[address], plain[address]) and not torch.equal(own[address], theirs[address])


def test_a_plan_is_of_both_parts():
    task = sentences(Run(progress=False))
    task.run.plan = []
    teacher_intervention(bert(), task, steps=40)
    assert [cost.steps for cost in task.run.plan] == [4, 36] and all(cost.seconds > 0 for cost in task.run.plan)
    with pytest.raises(RuleError, match="cannot be told apart"):
        other = text(run=Run(progress=False))
        other.run.plan = []
        teacher_intervention(gpt2(), other, mode="map", steps=40)


def test_a_first_learning_rate_of_zero_is_zero():
    task = sentences(Run(progress=False))
    teacher_intervention(bert(), task, first=2, first_lr=0.0, steps=3, lr=1e-3)
    assert task.run.histories[0].lr == [0.0, 0.0] and task.run.histories[1].lr[0] > 0


def test_projections_without_a_known_name_are_refused(monkeypatch):
    """Else the teacher would come in and no gradient would be stopped."""
    monkeypatch.setattr(signals, "PROJECTIONS", ())
    model = bert()
    with pytest.raises(RuleError, match="attention.self has no projections"):
        stops(model, "output")


def test_several_processes_are_refused_where_projections_hear_nothing():
    model, task = bert(), sentences()
    teacher = Teacher.of(model)
    two = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2))
    for at in POINTS:
        tactic = Intervention(at, {at: Intervened(task, teacher, model, at, **TERMS)})
        if at == "map":
            tactic.start(two)
            continue
        with pytest.raises(RunError, match=f"comes in at {at}.*one process"):
            tactic.start(two)


class Stop(Tactic):
    """Ends the run after so many steps of all its parts."""

    def __init__(self, at):
        self._at, self._seen = at, 0

    def after(self, loop):
        self._seen += 1
        if self._seen == self._at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [2, 5])
def test_a_killed_run_goes_on_as_if_it_had_not_been(at, tmp_path):
    """In the first part and in the second, with drawn points, curvature and dropout."""
    def trained(out, resume=False, stop=99, **more):
        run = Run(out, resume=resume, save_every=1, progress=False)
        run.tactics = (Stop(stop),)
        model = bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        return teacher_intervention(model, sentences(run), mode="stochastic", first=3, steps=7, lr=1e-3, loss_aware=True, **more).state_dict()

    whole = trained(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "b", stop=at)
    bert(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="another run: loss|another run: tactics"):
        trained(tmp_path / "b", resume=True, teacher=str(tmp_path / "other"))
    again = trained(tmp_path / "b", resume=True)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
