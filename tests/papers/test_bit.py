"""BiT: its numbers, its chain of teachers, and each exact check of its sheet."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import bert, pair, sentences
from tiny import Stop
from tiny import llama as tiny_llama
from tiny import task as text
from torch import nn

from qatlas.core.error import FormatError, QatlasError, QuantError, RuleError, RunError
from qatlas.core.grid import Sign, Uniform
from qatlas.core.noun import from_json
from qatlas.core.quantizer import Quantizer
from qatlas.export import target
from qatlas.export.onnx.fitting import why_not_signal
from qatlas.flags import run_parser
from qatlas.model.pack import checkpoint, load_packed, pack, save
from qatlas.model.quantized import quantized, quantizers
from qatlas.papers.bit import Elastic, Elasticity, at, binarize, bit, of_weight, rectify
from qatlas.papers.bitnet import of_weight as of_bitnet
from qatlas.train.imitate import Imitation
from qatlas.train.run import Run
from qatlas.train.tactic import Tactic
from qatlas.train.teacher import Teacher

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)
both = pytest.mark.parametrize("signed", [True, False])


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def holding(signed, alpha, beta=None, bits=1, **more):
    """An elastic quantizer in float64 with a given alpha, and beta (one a feature)."""
    quantizer = Elastic(Uniform(bits, None), move="none" if beta is None else "feature", **more).closed(signed).build()
    state = {"scale": torch.tensor([alpha], dtype=torch.float64)} | ({} if beta is None else {"move": -beta})
    quantizer.load_state_dict(state)
    quantizer.double().load_state_dict(state)
    return quantizer


def by_hand(signed, x, g, alpha, beta):
    """A number at a time, as the paper writes it -> value, dx, what alpha hears."""
    u = (x - beta) / alpha
    if signed:
        sign = 1.0 if u >= 0 else -1.0
        return alpha * sign, g * (abs(u) <= 1), g * sign
    value = min(max(round(u), 0), 1)
    return alpha * value, g * (0 <= u <= 1), g * (0 if u < 0 else 1 if u > 1 else round(u) - u)


@both
@few
@given(seeds, st.floats(0.05, 3.0))
def test_values_and_gradients_are_the_closed_form(signed, seed, alpha):
    x, g, beta = draw(seed, 3, 4, 6), draw(seed + 1, 3, 4, 6), draw(seed + 2, 6)
    quantizer, leaf = holding(signed, alpha, beta), x.clone().requires_grad_()
    y = quantizer(leaf)
    y.backward(g)
    hand = [by_hand(signed, *numbers, alpha, b) for numbers, b in
            zip(zip(x.flatten().tolist(), g.flatten().tolist(), strict=True), beta.tolist() * 12, strict=True)]
    value, dx, heard = (torch.tensor(part, dtype=torch.float64) for part in zip(*hand, strict=True))
    torch.testing.assert_close(y.detach().flatten(), value, rtol=1e-12, atol=1e-12)
    assert torch.equal(leaf.grad.flatten(), dx)
    torch.testing.assert_close(quantizer.move.grad, dx.view(12, 6).sum(0))               # d beta = - the sum, and move = - beta
    assert quantizer.scale.grad.item() == pytest.approx(heard.sum().item() / math.sqrt(72), rel=1e-9, abs=1e-9)


@both
@few
@given(seeds)
def test_two_values_equivariant_and_the_move_is_relative(signed, seed):
    x, alpha = draw(seed, 4, 8), 0.7
    y = holding(signed, alpha).hard(x)
    assert set(y.unique().tolist()) <= ({-alpha, alpha} if signed else {0.0, alpha})
    if signed:
        assert torch.equal(holding(True, 2 * alpha).hard(x), 2 * y)
    c = torch.full((8,), 2.0, dtype=torch.float64)                # x + c is exact in float64 for powers of two, up to the last bit of x
    x = x.float().double()
    assert torch.equal(holding(signed, alpha, c).hard(x + c), holding(signed, alpha, 0 * c).hard(x))


def test_the_threshold_of_zero_and_one_is_half_an_alpha_above_beta():
    beta = torch.tensor([0.25], dtype=torch.float64)
    x = torch.tensor([[0.74], [0.75], [0.7500001], [0.2], [9.0]], dtype=torch.float64)
    assert holding(False, 1.0, beta).hard(x).flatten().tolist() == [0, 0, 1, 0, 1]       # half to even at exactly one half
    assert holding(True, 1.0, beta).hard(torch.tensor([[0.25], [0.2]], dtype=torch.float64)).flatten().tolist() == [1, -1]


@both
def test_alpha_hears_the_derivative_with_the_codes_held(signed):
    """A binary value is alpha times its code; of {0, 1} that is what LSQ's rule says where x lies outside."""
    x, g, h = draw(0, 5, 40) * 4, draw(1, 5, 40), 1e-6
    if not signed:
        x = torch.where((x > 0) & (x < 1), x + 1, x)
    quantizer = holding(signed, 1.0)
    quantizer(x).backward(g)
    codes = quantizer.hard(x)
    slope = (((1 + h) * codes - (1 - h) * codes) * g).sum().item() / (2 * h)
    assert quantizer.scale.grad.item() == pytest.approx(slope / math.sqrt(200), rel=1e-6)


def test_eight_bits_with_the_minimum_are_an_offset_quantizer():
    x = draw(0, 6, 9) + 5
    alpha = float(x.max() - x.min()) / 255
    y = holding(False, alpha, bits=8, minimum=True).hard(x)
    assert torch.equal(y, ((x - x.min()) / alpha).round().clamp(0, 255) * alpha + x.min())
    assert (y - x).abs().max() <= alpha / 2 + 1e-12
    stored = holding(False, alpha, bits=8, minimum=True).quantize(x)
    torch.testing.assert_close(stored.dequantize().double(), y, rtol=1e-6, atol=1e-6)


@both
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_what_is_stored_is_what_is_computed(signed, bits):
    x = draw(0, 4, 8).float()
    quantizer = Elastic(Uniform(bits, None)).closed(signed).build().initialise(x.abs() if not signed else x)
    with torch.no_grad():
        quantizer.move.normal_()
    assert torch.equal(quantizer(x), quantizer.quantize(x).dequantize()) and torch.equal(quantizer(x), quantizer.hard(x))
    assert from_json(quantizer.quant.to_json()) == quantizer.quant


@both
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_starts(signed, bits):
    x = draw(0, 30, 20).float().abs()
    qp = max(2 ** (bits - 1) - 1, 1) if signed else 2**bits - 1
    start = (2 if signed else 4) * x.mean() / math.sqrt(qp)
    assert Elastic(Uniform(bits, None)).closed(signed).build().initialise(x).scale.item() == pytest.approx(start.item(), rel=1e-6)
    still = Elastic(Uniform(bits, None), learn=False).closed(signed)
    assert still.scale.factor == 0.0 and (bits > 1 or not signed or still.build().initialise(x).scale.item() == pytest.approx(x.mean().item()))


@few
@given(seeds)
def test_weights_have_two_values_and_one_bitnet_is_the_same(seed):
    w = draw(seed, 6, 17) + 0.2
    for quant, scale, middle in ((of_weight(), w.abs().mean(), w.mean()), (of_weight(True), w.abs().mean(1, keepdim=True), w.mean())):
        leaf = w.clone().requires_grad_()
        y = quant.build()(leaf)
        torch.testing.assert_close(y.detach(), torch.where(w >= middle, scale, -scale), rtol=1e-12, atol=0)
        y.backward(w)
        assert torch.equal(leaf.grad, w)                          # no mask, and nothing through mean and scale
    assert torch.equal(of_weight().hard(w), of_bitnet(1).hard(w))


def test_a_product_of_the_two_sets_is_whole_numbers():
    probabilities, value = draw(0, 2, 3, 5, 5).softmax(-1), draw(1, 2, 3, 5, 4)
    product = holding(False, 0.3).hard(probabilities) @ holding(True, 1.7).hard(value) / (0.3 * 1.7)
    torch.testing.assert_close(product, product.round(), rtol=0, atol=1e-9)


# ---- on a model ------------------------------------------------------------------------------------------------------------------------------------

def test_what_is_binarized_and_which_set_it_takes():
    model = binarize(bert(), sentences())
    layers, found = quantized(model), quantizers(model)
    assert {"bert.embeddings.word_embeddings", "bert.pooler.dense"} < set(layers) and len(layers) == 14 and "classifier" not in layers
    assert all(len(layer.quantize().codes.unique()) == 2 for layer in layers.values())
    grids = {name: q.quant.grid for name, q in found.items() if isinstance(q, Elasticity)}
    zero_one = {name for name, grid in grids.items() if grid == Uniform(1, False)}
    assert zero_one == {f"bert.encoder.layer.{i}.{part}" for i in range(2) for part in (
        "attention.self.probabilities_quantizer", "output.dense.input_quantizer")}
    assert all(grid == Sign() for name, grid in grids.items() if name not in zero_one) and len(grids) == 2 * (6 + 4) + 1
    shapes = {name.rpartition(".")[2]: tuple(q.move.shape) for name, q in found.items() if isinstance(q, Elasticity) and "layer.0.attention" in name}
    assert shapes == {"input_quantizer": (16,), "query_quantizer": (16,), "key_quantizer": (16,), "value_quantizer": (16,),
                      "probabilities_quantizer": (1,)}
    assert model.config.hidden_act == "relu" and isinstance(model.bert.encoder.layer[0].intermediate.intermediate_act_fn, nn.ReLU)


@pytest.mark.parametrize("moves, n", [("all", 21), ("inputs", 13), ("none", 0)])
def test_where_thresholds_are(moves, n):
    model = binarize(bert(), sentences(), moves=moves)
    assert sum(q.move is not None for q in quantizers(model).values() if isinstance(q, Elasticity)) == n
    assert len({id(q.move) for q in quantizers(model).values() if getattr(q, "move", None) is not None}) == n


def test_one_set_is_signs_everywhere():
    found = quantizers(binarize(bert(), sentences(), two_sets=False))
    assert all(q.quant.grid == Sign() for q in found.values())


def trained(model=None, task=None, **arguments):
    """The model after some steps, and copies of its parameters before the first and before the last step of each stage."""
    seen, groups = [], []

    class Look(Tactic):
        def start(self, loop):
            seen.append({name: p.detach().clone() for name, p in loop.model.named_parameters()})

        def after(self, loop):
            groups[:] = [dict(group) for group in loop.optimizer.param_groups]

    task = task or sentences()
    task.run.tactics = (Look(),)
    return bit(model or bert(), task, **{"steps": 4, "lr": 1e-2, "scale_lr": 1e-2, **arguments}), seen, groups


def test_everything_learns_and_the_rates_are_the_papers():
    model, (first, second), groups = trained()
    still = [name for name, p in model.named_parameters() if torch.equal(p, first.get(name, torch.tensor(0.0)))]
    assert not still
    assert {(group["role"], group["base_lr"], group["weight_decay"]) for group in groups} == {
        ("weights", 1e-2, 0.01), ("norms", 1e-2, 0.0), ("scales", 1e-2, 0.0)}
    moves = [name for name in first if name.endswith("move")]
    assert len(moves) == 21 and all(not second[name].equal(first[name]) for name in moves), "thresholds go on in the second stage"
    assert all(second[name].ne(first[name]).any() for name in first if name.endswith(".scale"))
    _, _, shares = trained(relative=True)
    assert all(group.get("relative") for group in shares if group["role"] == "scales")


def test_not_elastic_leaves_alpha_where_it_starts():
    model, (first,), _ = trained(elastic=False, chain=(1,))
    scales = [name for name in first if name.endswith(".scale")]
    assert len(scales) == 21 and not any("move" in name for name in first)
    assert all(torch.equal(dict(model.named_parameters())[name], first[name]) for name in scales)


def test_each_teacher_is_the_student_that_was_trained_last(monkeypatch):
    seen = []

    class Watching(Imitation):
        def __init__(self, task, teacher, student, **more):
            bits = {q.quant.bits for q in teacher.model.modules() if isinstance(q, Elasticity)}
            same = {n: t.clone() for n, t in teacher.model.state_dict().items()}
            before = {n: t.clone() for n, t in student.state_dict().items()}
            weights = all(torch.equal(t, before[n]) for n, t in same.items() if n in before and not n.endswith("scale"))
            seen.append((bits, weights, teacher.model is student, {q.quant.bits for q in student.modules() if isinstance(q, Elasticity)}))
            super().__init__(task, teacher, student, **more)

    monkeypatch.setattr("qatlas.papers.bit.Imitation", Watching)
    task = sentences()
    bit(bert(), task, chain=(4, 2, 1), steps=7)
    assert seen == [(set(), True, False, {4}), ({4}, True, False, {2}), ({2}, True, False, {1})]
    assert [len(history.loss) for history in task.run.histories] == [2, 2, 3]


def test_a_chain_of_one_is_the_direct_run_and_strengths_of_zero_leave_a_term_out():
    """The chain (1,) is by definition what one stage does, and (1, 1) begins with it, bit for bit."""
    task, other = sentences(), sentences()
    bit(bert(), task, chain=(1,), steps=2, warmup=0.0)
    bit(bert(), other, chain=(1, 1), steps=4, warmup=0.0)
    assert task.run.histories[0].loss == other.run.histories[0].loss
    terms = {}
    for name, weights in {"all": {"scores": 1.0}, "plain": {}, "logits": {"hidden": 0.0}, "hidden": {"logits": 0.0}}.items():
        plain = sentences()
        bit(bert(), plain, chain=(1,), steps=1, **weights)
        terms[name] = plain.run.histories[0].loss[0]
    assert terms["plain"] == pytest.approx(terms["logits"] + terms["hidden"], rel=1e-6) and terms["all"] > terms["plain"]


def test_another_number_of_bits_keeps_sets_and_thresholds():
    model = binarize(bert(), sentences())
    found = {name: q for name, q in quantizers(model).items() if isinstance(q, Elasticity)}
    signed = {name: q.quant.grid.low < 0 for name, q in found.items()}
    with torch.no_grad():
        for q in found.values():
            q.move.fill_(-0.5)                                    # what was never negative now is: the set must stay
    at(model, sentences(), 2)
    assert {q.quant.grid for q in found.values()} == {Uniform(2), Uniform(2, False)}
    assert {name: q.quant.grid.low < 0 for name, q in found.items()} == signed and all(q.ready for q in found.values())
    assert all((q.move == -0.5).all() for q in found.values())
    assert all(layer.slots.input == layer.input_quantizer.quant for layer in quantized(model).values() if layer.input_quantizer is not None)


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2", "llama"])
def test_it_learns_on_every_kind_of_model_and_packs(kind, tmp_path):
    model, task = pair(kind, tmp_path)
    task.run = Run(progress=False)
    model = bit(model, task, chain=(1,), steps=20, lr=3e-3 if kind == "bert" else 3e-4, scale_lr=1e-2, relative=True)
    losses = task.run.histories[0].loss                           # in the first steps BERT's Adam goes too far, being without bias correction
    assert sum(losses[-4:]) < sum(losses[4:8])
    x = {name: value for name, value in task.batch(0).items() if name != "labels"}
    before = model(**x).logits
    save(model, tmp_path / "saved")
    assert torch.equal(load_packed(tmp_path / "saved")(**x).logits, before), "moves, sets and ReLU are in the file"
    assert torch.equal(pack(model)(**x).logits, before)


def test_a_decoder_stays_causal():
    """Law 12, trained and packed; the cache included."""
    model, ids = bit(tiny_llama(), text(), steps=4, lr=1e-2, scale_lr=1e-2), torch.arange(24).view(2, 12) * 7 % 32
    with torch.no_grad():
        for name, q in quantizers(model).items():
            q.move.fill_(9.0) if "probabilities" in name else None  # a threshold below 0: what is masked must not come back
    for form in (lambda m: m, pack):
        model = form(model)
        whole, later, neighbour = model(ids).logits, ids.clone(), ids.clone()
        later[:, 8:], neighbour[1] = 5, 3
        assert torch.equal(model(later).logits[:, :8], whole[:, :8]) and torch.equal(model(neighbour).logits[0], whole[0])
        prefill = model(ids[:, :8], use_cache=True)
        rest = model(ids[:, 8:], past_key_values=prefill.past_key_values).logits
        torch.testing.assert_close(torch.cat([prefill.logits, rest], 1), whole, rtol=1e-4, atol=1e-4)


def test_relu_stands_for_gelu_and_not_for_a_gate():
    model, other = bert(), bert()
    other.config = model.config
    assert rectify(model) == [f"bert.encoder.layer.{i}.intermediate.intermediate_act_fn" for i in range(2)]
    assert model.config.hidden_act == "relu" and other.config.hidden_act == "gelu"
    assert rectify(tiny_llama()) == [] and binarize(bert(), sentences(), relu=False).config.hidden_act == "gelu"
    gated = tiny_llama()
    gated.model.layers[0].mlp.act_fn = nn.GELU()
    assert rectify(gated) == []


def test_it_resumes_in_either_stage_to_the_same_bits(tmp_path):
    def one(out, left=99, resume=False):
        run = Run(out, save_every=1, resume=resume, progress=False)

        class Later(Stop):
            def after(self, loop):
                nonlocal left
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt

        run.tactics = (Later(),)
        return bit(bert(), sentences(run), steps=4, lr=1e-2, scale_lr=1e-2)

    whole = one(tmp_path / "whole")
    for n in (1, 3):                                              # in the first stage, and in the second
        with pytest.raises(KeyboardInterrupt):
            one(tmp_path / f"halted{n}", left=n)
        again = one(tmp_path / f"halted{n}", resume=True)
        assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_target_holds_the_weights_and_no_file_says_what_an_elastic_signal_is(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                         num_key_value_heads=2, max_position_embeddings=64))
    model = bit(model, text(target="gguf:q4_0"), steps=2)
    form, name = target("gguf:q4_0")
    found = form.read(form.write(checkpoint(model), tmp_path / "model.gguf", name))
    layers = quantized(model)
    assert len(layers) == 15 and all(torch.equal(found[f"{n}.weight"], layer.hard()) for n, layer in layers.items())
    assert "Elastic does more" in why_not_signal(Elastic(Uniform(8, None)).closed(True), "int8")
    with pytest.raises(FormatError, match="signal inside attention"):
        bit(tiny_llama(), text(target="compressed-tensors:w4a8"), steps=2)


def test_dropout_of_the_teacher_is_an_argument(monkeypatch):
    modes = []

    class Watching(Imitation):
        def __call__(self, model, batch):
            modes.append(self.teacher.model.training)
            return super().__call__(model, batch)

    monkeypatch.setattr("qatlas.papers.bit.Imitation", Watching)
    for dropout in (False, True):
        bit(bert(), sentences(), steps=2, teacher_dropout=dropout)
    assert modes == [False, False, True, True]


@pytest.mark.parametrize("arguments, error, words", [
    ({"chain": ()}, RunError, "one stage or more"), ({"chain": (2, 1), "steps": 1}, RunError, "each needs a step"),
    ({"chain": (0,)}, QuantError, "1 to 8 bits, not 0"), ({"chain": (32, 1)}, QuantError, "not 32"), ({"steps": 0}, QatlasError, "chain"),
    ({"warmup": -1.0}, QatlasError, "warm")])
def test_arguments_that_cannot_work(arguments, error, words):
    with pytest.raises(error, match=words):
        bit(bert(), sentences(), **{"steps": 2, **arguments})


def test_what_a_model_cannot_take():
    with pytest.raises(QuantError, match="is a decoder"):
        bit(tiny_llama(), text(), minimum=True, steps=2)
    with pytest.raises(QuantError, match="no zero for what the mask hides"):
        bit(tiny_llama(), text(), two_sets=False, steps=2)
    with pytest.raises(RuleError, match="no table of words"):
        binarize(pair_of_vit(), None, embeddings=True)
    with pytest.raises(QuantError, match="before it is initialised"):
        Quantizer(Elastic().closed(True))(torch.ones(2, 2))


def pair_of_vit():
    from sentences import vit

    return vit()


def test_the_chain_is_a_flag():
    flags = run_parser("bit").parse_args(["--chain", "[4,2,1]", "--moves", "inputs", "--elastic", "false"])
    assert (tuple(flags.chain), flags.moves, flags.elastic) == ((4, 2, 1), "inputs", False)


def test_a_teacher_of_full_precision_has_no_numbers():
    assert not any(isinstance(q, Quantizer) for q in Teacher.of(bert()).model.modules())
