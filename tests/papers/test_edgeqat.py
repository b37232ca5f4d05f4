"""EdgeQAT: its losses, its numbers, tokens of two widths, and each exact check of its sheet."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import bert, gpt2, pair, sentences
from tiny import Stop
from tiny import llama as tiny_llama
from tiny import task as text

from qatlas.core.error import FormatError, QuantError, RuleError, RunError
from qatlas.core.grain import PerChannel, PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quantizer
from qatlas.export import target
from qatlas.export.onnx.fitting import why_not_signal
from qatlas.flags import run_parser
from qatlas.layers.tokens import Mixed, Mixing, Sorting
from qatlas.model.pack import checkpoint, load_packed, pack, save
from qatlas.model.quantized import quantized, quantizers
from qatlas.model.rules import quantize
from qatlas.model.serving import cache
from qatlas.model.taps import read
from qatlas.papers.edgeqat import Guided, Start, distribution_loss, edgeqat, entropy_loss, guided, of_input, rules
from qatlas.train.evaluate import evaluate
from qatlas.train.fit import fit
from qatlas.train.optim import SGD, AdamW
from qatlas.train.run import Run
from qatlas.train.schedule import cosine
from qatlas.train.tactic import Tactic
from qatlas.train.teacher import Distil, Teacher

IDS = torch.arange(24).view(2, 12) * 7 % 32
seeds = st.integers(0, 2**31)
few = settings(max_examples=10, deadline=None)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the losses ------------------------------------------------------------------------------------------------------------------------------------

@few
@given(seeds)
def test_entropy_has_the_gradient_of_the_published_sum(seed):
    q, k = (draw(seed + i, 2, 3, 4, 5, 6).requires_grad_() for i in (0, 1))
    published = -sum(torch.log1p(x.var(-1)).sum() for x in (q, k)).log()
    ours = entropy_loss(list(q), list(k))
    torch.testing.assert_close(ours.item(), (published + math.log(2 * 3 * 4 * 5)).item(), rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(published, (q, k))
    for mine, theirs in zip(torch.autograd.grad(ours, (q, k)), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_entropy_falls_where_the_variance_grows_and_padding_does_not_count():
    q, k = draw(0, 2, 3, 4, 6), draw(1, 2, 3, 4, 6)
    assert entropy_loss([2 * q], [k]) < entropy_loss([q], [k])
    seen = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    other = q.clone()
    other[1, :, 2:] *= 100
    assert entropy_loss([other], [k], seen) == entropy_loss([q], [k], seen) != entropy_loss([q], [k])


@few
@given(seeds)
def test_the_distribution_is_least_at_the_teacher_and_the_published_sign_is_most_there(seed):
    theirs = [draw(seed, 2, 3, 4, 4) + 1]
    other = [theirs[0] + draw(seed + 1, 2, 3, 4, 4)]
    for form, sign in (("log", 1), ("linear", 1), ("published", -1)):
        assert distribution_loss(theirs, theirs, form).abs() < 1e-6
        assert sign * distribution_loss(other, theirs, form) > 0
    assert distribution_loss(other, theirs) == -distribution_loss(other, theirs, "published")


def test_a_negative_cosine_has_a_finite_loss_that_points_the_right_way():
    theirs = draw(0, 1, 1, 3, 3)
    for start in (-theirs, 1e-4 * theirs - theirs.roll(1, -1) * 0.5):
        own = start.clone().requires_grad_()
        loss = distribution_loss([own], [theirs])
        loss.backward()
        assert loss.isfinite() and own.grad.isfinite().all()
    turned = (-theirs + 0.3 * theirs.roll(1, -1)).requires_grad_()
    before = distribution_loss([turned], [theirs])
    before.backward()
    assert distribution_loss([turned.detach() - 1e-4 * turned.grad], [theirs]) < before


def test_padding_is_not_compared():
    own, theirs, seen = draw(0, 2, 3, 4, 4), draw(1, 2, 3, 4, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    other = own.clone()
    other[1, :, 3] = other[1, :, :, 3] = 7
    assert distribution_loss([other], [theirs], seen=seen) == distribution_loss([own], [theirs], seen=seen)


def test_the_sum_and_its_zero_strengths():
    task, logits, said = torch.tensor(1.5), draw(0, 2, 5, 7), draw(1, 2, 5, 7)
    q, k, a, b = [draw(2, 2, 3, 5, 6)], [draw(3, 2, 3, 5, 6)], [draw(4, 2, 3, 5, 5) + 2], [draw(5, 2, 3, 5, 5) + 2]
    plain = guided(task, logits, said, q, k, a, b, entropy=0, distribution=0)
    whole = guided(task, logits, said, q, k, a, b)
    assert whole == plain + 0.5 * entropy_loss(q, k) + distribution_loss(a, b)
    assert guided(task, logits, said, q, k, a, b, distil=0, entropy=0, distribution=0) == task
    summed = guided(task, logits, said, q, k, a, b, distil=1, entropy=0, distribution=0, summed=True)
    torch.testing.assert_close(summed, 5 * guided(task, logits, said, q, k, a, b, distil=1, entropy=0, distribution=0))


@pytest.mark.parametrize("only, form, sign", [("distribution", "log", 1), ("distribution", "linear", 1), ("distribution", "published", -1),
                                              ("entropy", "log", 1)])
def test_one_step_with_one_loss_moves_what_it_is_named_after(only, form, sign):
    """The fixed distribution loss raises the mean cosine, the published one lowers it; entropy raises the variance of q and k."""
    task, model = text(), tiny_llama()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    teacher = Teacher.of(model)
    quantize(model, rules(model, bits=8, input_bits=8, low_bits=None), task)
    with torch.no_grad():                                         # some way from the teacher
        for p in model.model.layers.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))) if p.dim() == 2 else None
    weights = {"entropy": 0.0, "distribution": 0.0} | {only: 1.0}
    loss = Guided(task, teacher, teacher, model, distil=0.0, form=form, **weights)
    batch = task.batch(0)

    def measured():
        names = [f"model.layers.{i}.self_attn.{signal}_quantizer:output" for i in range(2) for signal in ("query", "key")]
        with torch.no_grad(), read(model, names) as own:
            model(batch["input_ids"])
        if only == "entropy":
            return sum(float(x.var(-1).mean()) for x in own.values())
        _, theirs = teacher.signals(task, batch, [f"model.layers.{i}.self_attn:{signal}" for i in range(2) for signal in ("query", "key")])
        pairs = [tuple(x[n] @ x[m].mT for n, m in ((0, 1), (2, 3))) for x in (list(own.values()), list(theirs.values()))]
        return -float(distribution_loss(*pairs, "linear"))

    before = measured()
    fit(model, task, optimizer=SGD(lr=2e-3, momentum=0.0), steps=4, loss=lambda m, b: loss(m, b) - task.loss(m, b), clip=1.0)
    assert sign * (measured() - before) > 0


# ---- the numbers -----------------------------------------------------------------------------------------------------------------------------------

@few
@given(seeds)
def test_the_activation_quantizer_is_the_closed_form(seed):
    """(round(clip(x / a + z)) - z) a with z a whole number on the grid; a and z hear LSQ's and the clipped part's."""
    x, g = draw(seed, 3, 5), draw(seed + 1, 3, 5)
    quantizer = Quantizer(of_input(4, True))
    state = {"scale": torch.tensor([0.3], dtype=torch.float64), "zero": torch.tensor([2.4], dtype=torch.float64)}
    quantizer.load_state_dict(state)
    quantizer.double().load_state_dict(state)
    leaf = x.clone().requires_grad_()
    y = quantizer(leaf)
    y.backward(g)
    u = x / 0.3 + 2
    v, inside = u.clamp(-8, 7).round(), (u >= -8) & (u <= 7)
    torch.testing.assert_close(y.detach(), 0.3 * (v - 2))
    assert torch.equal(leaf.grad, g * inside)
    gamma = 1 / math.sqrt(15 * 7)
    assert quantizer.scale.grad.item() == pytest.approx(float((g * torch.where(inside, v - u, v - 2)).sum()) * gamma, rel=1e-9, abs=1e-12)
    assert quantizer.zero.grad.item() == pytest.approx(-0.3 * float((g * ~inside).sum()) * gamma, rel=1e-9, abs=1e-12)


def test_starts():
    x = torch.randn(1, 4000) + 0.5
    place = Start().measure(x, Uniform(4))
    assert place.s.item() == pytest.approx(2 * x.abs().mean().item() / math.sqrt(7), rel=1e-5) and place.zero.item() == 0
    theirs = Start(published=True).measure(x, Uniform(4))
    assert theirs.zero.item() == pytest.approx(0.1 * (x.min() + 8 * place.s).item(), rel=1e-5) and theirs.zero.abs() < 0.5
    assert Quantizer(of_input(4, True, "none")).initialise(x).zero is None


@pytest.mark.parametrize("low_bits", [None, 4])
def test_what_is_quantized_and_what_is_not(low_bits):
    model = edgeqat(tiny_llama(), text(), low_bits=low_bits, steps=1)
    layers, found = quantized(model), quantizers(model)
    assert len(layers) == 14 and all(layer.weight_quantizer.quant.grain == PerTensor() for layer in layers.values())
    assert {name for name, layer in layers.items() if layer.input_quantizer is None} == {f"model.layers.{i}.self_attn.o_proj" for i in range(2)}
    inside = {name.rpartition(".")[2] for name in found if "self_attn." in name and name.count(".") == 4}
    assert inside == {"query_quantizer", "key_quantizer", "value_quantizer", "probabilities_quantizer"} | (
        {"scores_quantizer"} if low_bits else set())
    assert found["model.layers.1.self_attn.probabilities_quantizer"].quant.grid == Uniform(8, False)
    mixing = {name for name, q in found.items() if isinstance(q, Mixing)}
    first = {f"model.layers.0.self_attn.{part}" for part in ("q_proj.input_quantizer", "k_proj.input_quantizer", "v_proj.input_quantizer",
                                                              "query_quantizer", "key_quantizer")}
    assert not mixing & first and len(mixing) == (13 if low_bits else 0)
    assert all(q.low.quant.grid == Uniform(4) and q.quant.grid == Uniform(8) for name, q in found.items() if name in mixing)
    rowwise = edgeqat(tiny_llama(), text(), rows=True, output_input=True, low_bits=low_bits, steps=1)
    assert all(layer.weight_quantizer.quant.grain == PerChannel() and layer.input_quantizer is not None for layer in quantized(rowwise).values())


# ---- training --------------------------------------------------------------------------------------------------------------------------------------

def test_everything_learns():
    seen = {}

    class Look(Tactic):
        def start(self, loop):
            seen.update({name: p.detach().clone() for name, p in loop.model.named_parameters()})

        def after(self, loop):
            groups[:] = [dict(group) for group in loop.optimizer.param_groups]

    groups, task = [], text()
    task.run.tactics = (Look(),)
    model = edgeqat(tiny_llama(), task, steps=4, lr=1e-2, warmup=0.0)
    still = [name for name, p in model.named_parameters() if torch.equal(p, seen[name])]
    assert all(name.endswith("zero") for name in still), "a zero hears only what lies outside of the grid"
    assert {(group["role"], group["base_lr"], group["weight_decay"]) for group in groups} == {
        ("weights", 1e-2, 0.1), ("norms", 1e-2, 0.0), ("scales", 1e-2, 0.0)}


def test_strengths_of_zero_are_plain_lsq_with_distillation_bit_for_bit():
    task, other = text(), text()
    model = edgeqat(tiny_llama(), task, low_bits=None, entropy=0.0, distribution=0.0, steps=3, lr=1e-3)
    plain = tiny_llama()
    teacher = Teacher.of(plain)
    quantize(plain, rules(plain, low_bits=None), other)
    loss = Distil(other, teacher, temperature=2.0, share=0.5)
    fit(plain, other, optimizer=AdamW(lr=1e-3, weight_decay=0.1), schedule=cosine(0.05), steps=3, loss=loss)
    assert task.run.histories[0].loss == other.run.histories[0].loss
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


@pytest.mark.parametrize("low_share, bits", [(0.0, 8), (0.05, 8)])
def test_no_narrow_tokens_are_plain_eight_bits_bit_for_bit(low_share, bits):
    """0.05 of 16 tokens is less than one."""
    mixed = edgeqat(tiny_llama(), text(), low_share=low_share, steps=3, lr=1e-3)
    plain = edgeqat(tiny_llama(), text(), low_bits=None, input_bits=bits, steps=3, lr=1e-3)
    assert torch.equal(mixed(IDS).logits, plain(IDS).logits)


def test_all_narrow_tokens_have_four_bits():
    model = edgeqat(tiny_llama(), text(), low_share=1.0, steps=2)
    with read(model, ["model.layers.1.self_attn.value_quantizer:output", "model.layers.1.mlp.down_proj:input"]) as found:
        model(IDS)
    assert found["model.layers.1.self_attn.value_quantizer:output"].unique().numel() <= 16


def test_two_widths_lie_between_one_and_the_other():
    """Rounding alone: the error of the logits."""
    full = tiny_llama()(IDS).logits
    off = []
    for more in ({"low_bits": None}, {"low_bits": 2}, {"input_bits": 2, "low_bits": None}):
        model = edgeqat(tiny_llama(), text(), bits=8, steps=1, lr=1e-9, **more)
        off.append((model(IDS).logits - full).square().mean().item())
    assert off[0] < off[1] < off[2]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_it_learns_saves_and_packs(kind, tmp_path):
    model, task = pair(kind, tmp_path)
    task.run = Run(progress=False)
    before = evaluate(model, task)["loss"]
    model = edgeqat(model, task, steps=16, lr=3e-3)
    assert evaluate(model, task)["loss"] < before
    logits = model(IDS).logits
    save(model, tmp_path / "saved")
    loaded = load_packed(tmp_path / "saved")
    assert torch.equal(loaded(IDS).logits, logits) and torch.equal(pack(model)(IDS).logits, logits)
    assert any(isinstance(q, Sorting) for q in quantizers(loaded).values())


@pytest.mark.parametrize("make", [tiny_llama, gpt2])
def test_a_decoder_stays_causal(make):
    """Law 12, trained and packed: neither a later token nor another row, and the cache token by token."""
    model = edgeqat(make(), text(), steps=3, lr=1e-3)
    for form in (lambda m: m, pack):
        model = form(model)
        whole, later, neighbour = model(IDS).logits, IDS.clone(), IDS.clone()
        later[:, 8:], neighbour[1] = 5, 3
        assert torch.equal(model(later).logits[:, :8], whole[:, :8]) and torch.equal(model(neighbour).logits[0], whole[0])
        prefill = model(IDS[:, :8], use_cache=True)
        parts = [prefill.logits, *(model(IDS[:, i : i + 1], past_key_values=prefill.past_key_values).logits for i in range(8, 11))]
        parts.append(model(IDS[:, 11:], past_key_values=prefill.past_key_values).logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    marked = [q._past for q in quantizers(model).values() if isinstance(q, Sorting)]
    assert any(0 < low.sum() < low.numel() for low in marked), "or the test could not fail"


def test_generation_goes_and_beams_are_refused():
    model = edgeqat(tiny_llama(), text(), steps=3, lr=1e-3).eval()
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(IDS[:, :5], **given)
    again = model.generate(IDS[:1, :5], use_cache=False, **given)
    assert torch.equal(out[:1], again)
    with pytest.raises(QuantError, match=r"beam|not known"):
        model.generate(IDS[:, :5], num_beams=4, **given)
    with pytest.raises(QuantError, match="no codes of it can be stored"):
        cache(model)


def test_a_padded_row_is_the_row():
    """Padding on the left, as batches are generated: the first token is the first that is there."""
    model = edgeqat(tiny_llama(), text(), steps=3, lr=1e-3)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), IDS[:1, :8]], 1)
    mask = torch.cat([torch.zeros(1, 4), torch.ones(1, 8)], 1)
    positions = torch.cat([torch.zeros(1, 4), torch.arange(8)[None]], 1).long()
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(found, model(IDS[:1, :8]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("more", [{}, {"maps": "probabilities", "form": "linear"}])
def test_it_resumes_to_the_same_bits(tmp_path, more):
    def one(out, stop_at=None, resume=False):
        run = Run(out, save_every=1, resume=resume, progress=False)
        run.tactics = (Stop(stop_at),)
        return edgeqat(tiny_llama(), text(run=run), steps=3, lr=1e-3, **more)

    whole = one(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path / "halted", stop_at=1)
    again = one(tmp_path / "halted", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_further_teachers_are_averaged(tmp_path):
    for seed in (1, 2):
        tiny_llama(seed).save_pretrained(tmp_path / str(seed))
    losses = []
    for teachers in ((), (str(tmp_path / "1"), str(tmp_path / "2"))):
        task = text()
        edgeqat(tiny_llama(), task, teachers=teachers, distil=1.0, steps=1)
        losses.append(task.run.histories[0].loss[0])
    assert losses[0] != losses[1]
    small = type(tiny_llama())(type(tiny_llama().config)(**tiny_llama().config.to_dict() | {"vocab_size": 31}))
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(RunError, match=r"classes|vocabulary|tokens"):
        edgeqat(tiny_llama(), text(), teachers=(str(tmp_path / "small"),), steps=1)


def test_a_target_holds_the_weights_and_no_file_says_what_two_widths_are(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                         num_key_value_heads=2, max_position_embeddings=64))
    model = edgeqat(model, text(target="gguf:q4_0"), steps=2)
    form, name = target("gguf:q4_0")
    found = form.read(form.write(checkpoint(model), tmp_path / "model.gguf", name))
    layers = quantized(model)
    assert len(layers) == 14 and all(torch.equal(found[f"{n}.weight"], layer.hard()) for n, layer in layers.items())
    assert "Mixed does more" in why_not_signal(Mixed(Uniform(8), PerTensor(), of_input(8).scale), "int8")
    assert why_not_signal(of_input(8), "int8") is None
    with pytest.raises(FormatError, match="signal inside attention"):
        edgeqat(tiny_llama(), text(target="compressed-tensors:w4a8"), steps=2)


@pytest.mark.parametrize("arguments, words", [
    ({"bits": 1}, "bits=1"), ({"bits": 9}, "bits=9"), ({"input_bits": 1}, "input_bits=1"), ({"low_bits": 1}, "low_bits=1"),
    ({"input_bits": 4}, "--low_bits null"), ({"input_bits": None}, "--low_bits null"), ({"low_share": 1.5}, r"0 \.\.\. 1")])
def test_arguments_that_cannot_work(arguments, words):
    with pytest.raises(QuantError, match=words):
        edgeqat(tiny_llama(), text(), steps=1, **arguments)


def test_an_encoder_is_refused_and_activations_may_stay_full():
    with pytest.raises(RuleError, match="no decoder"):
        edgeqat(bert(), sentences(), steps=1)
    model = edgeqat(tiny_llama(), text(), input_bits=None, low_bits=None, steps=2)
    assert all(q.quant.grid == Uniform(4) for q in quantizers(model).values())


def test_flags():
    flags = run_parser("edgeqat").parse_args(["--low_bits", "null", "--form", "published", "--teachers", "[a,b]"])
    assert (flags.low_bits, flags.form, list(flags.teachers)) == (None, "published", ["a", "b"])
