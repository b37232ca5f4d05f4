"""EfficientQAT: the exact checks of its sheet, and what its two phases promise on a Llama of two layers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import WORDS
from tiny import Stop, letters
from tiny import llama as tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from qatlas.core.error import FormatError, QatlasError, QuantError
from qatlas.core.grain import Group, PerChannel
from qatlas.core.quantizer import Quantizer
from qatlas.export import target
from qatlas.layers.packed import Packed, PackedLinear
from qatlas.layers.quantized import Quantized
from qatlas.model.pack import checkpoint, load_packed, save
from qatlas.model.rules import Rule
from qatlas.papers.efficientqat import efficientqat, of_weight
from qatlas.train import data, fit
from qatlas.train.evaluate import evaluate
from qatlas.train.run import Run
from qatlas.train.tactic import Tactic
from qatlas.train.task import LanguageModelling

IDS = torch.arange(24).view(2, 12) % 32
few = settings(max_examples=20, deadline=None)


def lm(**more):
    run = more.pop("run", None) or Run(progress=False)
    return LanguageModelling(data.Text(WORDS * 20, WORDS * 4), letters, length=16, batch=4, run=run, **more)


def loud():
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(10) if parameter.dim() > 1 else None
    return model


def run(task=None, model=None, **arguments):
    return efficientqat(model or loud(), task or lm(), **{"steps": 3, "group": 8, "batches": 3, "block_lr": 3e-3, "lr": 1e-3, **arguments})


def stores(model):
    return {name: layer.store for name, layer in model.named_modules() if isinstance(layer, Packed)}


# ---- the numbers -----------------------------------------------------------------------------------------------------------------------------------

@few
@given(st.integers(0, 2**31), st.sampled_from([2, 3, 4]), st.sampled_from([4, 8]))
def test_the_formulas_of_the_essay(seed, bits, group):
    draw = torch.Generator().manual_seed(seed)
    w, g = (torch.randn(4, 16, generator=draw, dtype=torch.float64) for _ in range(2))
    quantizer = Quantizer(of_weight(bits, Group(group))).double()
    quantizer.initialise(w)
    with torch.no_grad():
        quantizer.scale.copy_(quantizer.scale * (0.5 + torch.rand(quantizer.scale.shape, generator=draw)))
        quantizer.zero.add_(torch.rand(quantizer.zero.shape, generator=draw) * 3 - 1.5)
    quantizer.double()
    x = w.clone().requires_grad_()
    y = quantizer(x)
    y.backward(g)
    top, s, z = 2**bits - 1, quantizer.scale.detach()[..., None], quantizer.zero.detach()[..., None].round().clamp(0, 2**bits - 1)
    u, gg = w.view(4, -1, group) / s, g.view(4, -1, group)
    q = ((u + z).round()).clamp(0, top)
    inside = ((u + z).round() >= 0) & ((u + z).round() <= top)
    torch.testing.assert_close(y.detach().view_as(u), s * (q - z))
    torch.testing.assert_close(x.grad.view_as(u), gg * inside)
    torch.testing.assert_close(quantizer.scale.grad, (gg * torch.where(inside, (u + z).round() - u - z, q - z)).sum(-1))
    torch.testing.assert_close(quantizer.zero.grad, (gg * -s * ~inside).sum(-1))


def test_the_start_is_the_range_and_a_group_of_equal_weights_lives():
    w = torch.tensor([[-1.0, 0.5, 2.0, 0.0], [0.3, 0.3, 0.3, 0.3], [1e-9, 0.0, 0.0, 0.0]])
    q = of_weight(2, PerChannel()).quantize(w)
    torch.testing.assert_close(q.steps, torch.tensor([1.0, 0.1, 1e-4]))
    assert q.zero.tolist() == [1, 0, 0]
    torch.testing.assert_close(q.dequantize()[1], w[1])


def test_the_steps_of_a_packed_layer_hear_the_exact_gradient_and_no_weight_waits():
    torch.manual_seed(0)
    layer = PackedLinear.holding(of_weight(2, Group(8)).quantize(torch.randn(64, 128)), torch.nn.Linear(128, 64),
                                 type("S", (), {"input": None, "adapter": None})())
    x, kept = torch.randn(2, 128, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert sum(t.numel() for t in kept if t.dtype == torch.float32) < 64 * 128 / 4
    g = torch.randn(2, 64)
    y.backward(g)
    q = layer.qtensor()
    outer = (g.T @ x.detach()).view(64, 16, 8)
    torch.testing.assert_close(layer.store.scale.grad, (outer * (q.values().view(64, 16, 8) - q.zero[..., None])).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, g @ q.dequantize())


# ---- the phases ------------------------------------------------------------------------------------------------------------------------------------

def test_phase_one_trains_blocks_and_phase_two_their_steps_alone():
    seen = []

    class Look(Tactic):
        def start(self, loop):
            seen.append((loop.task.title, {name: p.detach().clone() for name, p in loop.model.named_parameters()}))

        def after(self, loop):
            if loop.step == loop.steps - 1:
                seen.append((loop.task.title, {name: p.detach().clone() for name, p in loop.model.named_parameters()}))

    task = lm()
    task.run.tactics = (Look(),)
    run(task)
    assert [title for title, _ in seen] == ["block 1 of 2"] * 2 + ["block 2 of 2"] * 2 + ["fit"] * 2
    for (_, before), (title, after) in zip(seen[::2], seen[1::2], strict=True):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        still = {name for name in before if name.endswith("quantizer.zero")}                  # it hears a gradient where something is cut only
        assert moved | still == ({name for name in before if name.endswith("store.scale")} if title == "fit" else set(before))


def test_codes_and_zeros_of_phase_one_are_those_of_the_end():
    first, both = run(steps=0, block_steps=4), run(steps=3, block_steps=4)
    for name, store in stores(both).items():
        other = stores(first)[name]
        assert torch.equal(store.codes, other.codes) and torch.equal(store.zero, other.zero) and not torch.equal(store.scale, other.scale)
    assert not any(isinstance(m, Quantized) for m in both.modules()) and type(both.lm_head) is torch.nn.Linear
    assert len(stores(both)) == 14


def test_a_learning_rate_of_zero_learns_steps_and_zeros_only():
    from qatlas.model.rules import quantize

    model, rounded = run(steps=0, block_steps=3, block_lr=0.0, block_scale_lr=1e-12), quantize(loud(), [Rule("*proj", weight=of_weight(2, Group(8)))])
    assert torch.equal(model(IDS).logits, rounded(IDS).logits), "nothing moved: rounding to nearest"
    learned = run(steps=0, block_steps=3, block_lr=0.0, block_scale_lr=3e-2)
    assert torch.equal(learned.model.layers[0].input_layernorm.weight, loud().model.layers[0].input_layernorm.weight)
    assert not torch.equal(learned(IDS).logits, rounded(IDS).logits)


def test_without_phase_one_it_starts_from_rounding_and_sees_the_data_from_its_beginning():
    task = lm()
    seen = []
    task.run.tactics = (type("Look", (Tactic,), {"before": lambda self, loop: seen.append(loop.task.begin)})(),)
    run(task, block_steps=0)
    assert seen == [0, 0, 0] and len(task.run.histories) == 1
    task = lm()
    task.run.tactics = (type("Look", (Tactic,), {"before": lambda self, loop: seen.append(loop.task.begin)})(),)
    run(task, batches=2)
    assert seen[-3:] == [2, 2, 2] and len(task.run.histories) == 3


def test_both_phases_lower_the_loss():
    torch.manual_seed(0)
    full = loud()
    fit.fit(full, lm(), optimizer=fit.AdamW(lr=3e-3), steps=60)

    def started():
        model = loud()
        model.load_state_dict(full.state_dict())
        return model

    steps = {"rounded": (0, 1, 1e-9), "first": (20, 1, 1e-9), "both": (20, 20, 3e-3)}
    loss = {name: evaluate(run(model=started(), block_steps=a, steps=b, lr=lr, block_scale_lr=1e-3), lm())["loss"]
            for name, (a, b, lr) in steps.items()}
    assert loss["both"] < loss["first"] < loss["rounded"]


@pytest.mark.parametrize("kill", [1, 4, 7])
def test_it_resumes_in_either_phase_to_the_same_bits(kill, tmp_path):
    class Kill(Tactic):
        def __init__(self, at=None):
            self._left = at

        def after(self, loop):
            self._left = None if self._left is None else self._left - 1
            if self._left == 0:
                raise KeyboardInterrupt

    def one(out, at=None, resume=False):
        task = lm(run=Run(out, save_every=1, resume=resume, progress=False))
        task.run.tactics = (Kill(at),)
        return run(task)

    whole = one(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path / "halted", kill)
    again = one(tmp_path / "halted", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_streams_on_disk_give_the_same(tmp_path):
    memory, disk = run(), run(streams=str(tmp_path / "streams"))
    assert torch.equal(memory(IDS).logits, disk(IDS).logits) and not list((tmp_path / "streams").iterdir())


def test_it_saves_and_loads(tmp_path):
    model = run(model=llama())
    save(model, tmp_path / "saved")
    assert torch.equal(load_packed(tmp_path / "saved")(IDS).logits, model(IDS).logits)


# ---- formats ---------------------------------------------------------------------------------------------------------------------------------------

def llama(width=64):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
                                        num_key_value_heads=2, max_position_embeddings=64))


@pytest.mark.parametrize("name, arguments", [
    ("gptq:w2_v2", {}), ("gptq:w3_v2", {"bits": 3}), ("gptq:w4_v2", {"bits": 4}), ("awq:w4", {"bits": 4}), ("compressed-tensors:w2a16", {}),
    ("compressed-tensors:w4a16", {"bits": 4}), ("gguf:q4_0", {}), ("gguf:q4_1", {"bits": 4, "zero": "offset", "group": 32}),
    ("gguf:q4_0", {"bits": 4, "zero": "none", "group": 32})])
def test_the_formats_own_reader_gives_the_trained_weights(name, arguments, tmp_path):
    task = lm(target=name)
    model = efficientqat(llama(), task, **{"steps": 2, "batches": 2, "block_lr": 1e-3, "lr": 1e-3, "group": 64, **arguments})
    form, kind = target(name)
    if hasattr(form, "lacks") and form.lacks():
        pytest.skip(form.lacks())
    file = form.write(checkpoint(model), tmp_path / f"model.{form.SUFFIX}" if form.SUFFIX else tmp_path / "model", kind)
    found = form.read(file)
    for at, layer in model.named_modules():
        if isinstance(layer, Packed):
            assert torch.equal(found[f"{at}.weight"], layer.hard()), at


def test_what_a_target_cannot_hold_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(fit, "_steps", None)
    with pytest.raises(FormatError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        efficientqat(llama(), lm(target="gguf:tq2_0"), steps=1)
    with pytest.raises(FormatError, match="q_proj"):
        efficientqat(llama(), lm(target="gguf:q4_0"), bits=4, steps=1)


@pytest.mark.parametrize("wrong", [{"bits": 1}, {"bits": 9}, {"bits": 2.5}, {"zero": "half"}, {"group": 7}, {"batches": 0}, {"steps": -1}])
def test_arguments_that_cannot_work(wrong):
    with pytest.raises(QatlasError):
        run(**wrong)
    assert issubclass(QuantError, QatlasError) and Stop(None)._at is None
