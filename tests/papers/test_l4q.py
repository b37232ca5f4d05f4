"""L4Q: its start, its gradients, its limit cases, merging, formats."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from words import IDS, llama, same, state, task

from qatlas.core.error import FormatError, QuantError
from qatlas.core.grid import Uniform
from qatlas.export import target
from qatlas.layers.adapter import Lora
from qatlas.layers.frozen import Cast
from qatlas.layers.linear import QLinear
from qatlas.layers.quantized import Slots
from qatlas.model.pack import checkpoint, load_packed, save
from qatlas.model.quantized import quantized
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.papers.l4q import TRAINED, Covering, l4q, of_weight
from qatlas.train.fit import fit
from qatlas.train.optim import AdamW
from qatlas.train.schedule import cosine


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([2, 3, 4, 8]), st.floats(-3, 3))
def test_the_start_cuts_nothing_and_no_smaller_step_would(seed, bits, middle):
    w, grid = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)) + middle, Uniform(bits)
    s = Covering().measure(w, grid).s
    u = w / s
    assert (u >= grid.low - 1e-4).all() and (u <= grid.high + 1e-4).all()
    smaller = w / (0.999 * s)
    assert ((smaller < grid.low) | (smaller > grid.high)).any(1).all()


@pytest.mark.parametrize("offset", [False, True])
def test_gradients_are_the_papers(offset):
    torch.manual_seed(0)
    module = nn.Linear(32, 8, bias=False).double()
    slots = Slots(of_weight(3, 8, "covering", offset, False, None), adapter=Lora(4, 8.0), frozen=Cast(), keep="recompute")
    layer = QLinear.of(module, slots).double()
    q, a, b = layer.weight_quantizer, layer.adapter.a, layer.adapter.b
    with torch.no_grad():
        b.normal_(), q.scale.mul_(0.8)
        if offset:
            q.offset.normal_(std=0.1)
    x = torch.randn(11, 32, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.backward(dy := torch.randn_like(y))
    view, s = q.quant.grain.view, q.scale.detach().unsqueeze(-1)
    m = q.offset.detach().unsqueeze(-1) if offset else 0.0
    v = (view(module.weight.detach() + 2 * (b @ a).detach()) - m) / s
    inside, wt = (v >= -4) & (v <= 3), v.clamp(-4, 3).round()
    w_hat, g = (wt * s + m).reshape(8, 32), dy.T @ x.detach()
    masked = (view(g) * inside).reshape(8, 32)
    assert 0 < inside.double().mean() < 1
    torch.testing.assert_close(x.grad, dy @ w_hat)
    torch.testing.assert_close(a.grad, 2 * b.detach().T @ masked)
    torch.testing.assert_close(b.grad, 2 * masked @ a.detach().T)
    torch.testing.assert_close(q.scale.grad, (view(g) * torch.where(inside, wt - v, wt)).sum(-1))
    if offset:
        torch.testing.assert_close(q.offset.grad, (view(g) * ~inside).sum(-1))


@pytest.mark.parametrize("offset", [False, True])
def test_with_alpha_zero_it_is_lsq_on_frozen_weights(offset):
    quant, ends = of_weight(4, 32, "covering", offset, False, None), []
    for more in ({"adapter": Lora(4, 0.0), "frozen": Cast(), "keep": "recompute"}, {}):
        model = quantize(llama(), [*keep_full("@embedding", "@head"), Rule("*", weight=quant, **more)])
        fit(model, task(), train="*_quantizer.*", optimizer=AdamW(lr=1e-3), schedule=cosine(0.1), steps=4)
        ends.append([(state(layer.weight_quantizer), layer.hard()) for layer in quantized(model).values()])
    for (steps, hard), (others, there) in zip(*ends, strict=True):
        assert same(steps, others) and torch.equal(hard, there)


def test_the_paper_with_alpha_zero_is_lsq_too():
    """The norm that clips gradients sums over adapters as well, whose gradients are zero: in another order, so not to the last bit."""
    paper = l4q(llama(), task(), group=32, alpha=0.0, steps=4, lr=1e-3)
    plain = quantize(llama(), [*keep_full("@embedding", "@head"), Rule("*", weight=of_weight(4, 32, "covering", None, False, None))])
    fit(plain, task(), train="*_quantizer.*", optimizer=AdamW(lr=1e-3), schedule=cosine(0.1), steps=4)
    for name, layer in quantized(plain).items():
        torch.testing.assert_close(quantized(paper)[name].weight_quantizer.scale, layer.weight_quantizer.scale, rtol=1e-4, atol=0)


def test_only_adapters_and_steps_train_and_the_weights_keep_the_type_asked_for():
    begun, plain = l4q(llama(), task(), group=32, steps=1, lr=0.0), llama()
    model = l4q(llama(), task(), group=32, steps=3, lr=1e-2, store="bfloat16")
    moved = {name.split(".")[-1] for name, t in state(model).items() if t.dtype == torch.float32 and not torch.equal(t, state(begun)[name])}
    assert moved == {"a", "b", "scale", "offset"} and TRAINED
    for name, layer in quantized(model).items():
        assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight, plain.get_submodule(name).weight.to(torch.bfloat16))
        assert torch.equal(quantized(begun)[name].weight, plain.get_submodule(name).weight)


def test_fewer_weights_are_cut_after_training_from_the_papers_start():
    cut = {}
    for start in ("covering", "absmax"):
        model = l4q(llama(), task(), bits=3, group=32, steps=6, scale_lr=0.01, start=start, offset=False)
        places = [layer.weight_quantizer.quant.grain.view(layer.source().detach()) / layer.weight_quantizer.scale.detach().unsqueeze(-1)
                  for layer in quantized(model).values()]
        cut[start] = float(torch.cat([((p < -4.001) | (p > 3.001)).flatten().float() for p in places]).mean())
    assert cut["covering"] < 0.5 * cut["absmax"]


@pytest.mark.parametrize("arguments", [{}, {"start": "minmax"}, {"offset": False, "store": "bfloat16"}], ids=str)
def test_merged_packed_and_loaded_answer_as_trained(arguments, tmp_path):
    model = l4q(llama(), task(), group=32, steps=3, lr=1e-2, **arguments)
    logits, codes = model(IDS).logits, {name: layer.quantize().codes for name, layer in quantized(model).items()}
    save(model, tmp_path / "saved")
    loaded = load_packed(tmp_path / "saved")
    assert torch.equal(loaded(IDS).logits, logits) and not any("adapter" in name for name in loaded.state_dict())
    for name, layer in quantized(model).items():
        layer.merge()
        assert torch.equal(layer.quantize().codes, codes[name]) and layer.adapter is None and isinstance(layer.weight, nn.Parameter)
    assert torch.equal(model(IDS).logits, logits)


@pytest.mark.parametrize(("name", "shifted"), [("gguf:q4_1", True), ("gguf:q5_1", True), ("gguf:q4_0", False), ("gptq:w4", False),
                                               ("compressed-tensors:w4a16", False)])
def test_formats_read_it_back_and_say_whether_there_is_an_offset(name, shifted, tmp_path):
    model = l4q(llama(), task(target=name), group=64, steps=2, lr=1e-3)
    assert {layer.weight_quantizer.offset is not None for layer in quantized(model).values()} == {shifted}
    module, kind = target(name)
    if hasattr(module, "lacks") and module.lacks():
        pytest.skip(module.lacks())
    found = module.read(module.write(checkpoint(model), tmp_path / (f"m.{module.SUFFIX}" if module.SUFFIX else "m"), kind))
    for at, layer in quantized(model).items():
        assert torch.equal(found[f"{at}.weight"], layer.hard()), at


def test_an_offset_asked_for_aloud_is_refused_by_a_target_without():
    with pytest.raises(FormatError, match="offset"):
        l4q(llama(), task(target="gguf:q4_0"), group=64, offset=True, steps=1)


@pytest.mark.parametrize(("wrong", "words"), [({"bits": 1}, "bits=1"), ({"start": "max"}, "'max'"), ({"start": "minmax", "offset": False}, "offset"),
                                              ({"store": "int8"}, "'int8'"), ({"group": 48}, "48")])
def test_what_is_refused_is_refused_before_anything_moves(wrong, words):
    model = llama()
    with pytest.raises(QuantError, match=words):
        l4q(model, task(), steps=1, **wrong)
    assert not quantized(model)
