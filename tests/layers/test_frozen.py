"""Frozen weights: what is stored, what is computed from it, its gradients in closed form, what backward keeps, merging, saving."""

import gc
import itertools
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from qatlas.core.error import QuantError, RuleError
from qatlas.core.estimator import Clip
from qatlas.core.grain import PerChannel
from qatlas.core.grid import HalfStep, Uniform
from qatlas.core.noun import from_json
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, Learned
from qatlas.core.transform import Hadamard
from qatlas.layers.adapter import Lora
from qatlas.layers.conv import QConv2d
from qatlas.layers.frozen import Cast, Places
from qatlas.layers.linear import QLinear, QTransposed
from qatlas.layers.quantized import Slots
from qatlas.layers.rows import Rows
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.papers.l4q import of_weight as l4q_weight
from qatlas.papers.lr_qat import of_weight as places_weight

X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
FORMS = ("fixed", "integer", "float32", "bfloat16", "float16")
QUANTS = [places_weight(bits, group, symmetric, None) for bits, group, symmetric in
          ((4, None, True), (3, 16, True), (2, 16, False), (4, None, False), (7, 32, False))]
WAYS = [*(({"weight": q, "adapter": Lora(4, 2.0, "shift"), "frozen": Places(form)}) for q in QUANTS for form in FORMS),
        *({"weight": l4q_weight(4, group, "covering", offset, False, None), "adapter": Lora(4, 2.0, place), "frozen": Cast(to)}
          for group, offset, place, to in ((None, False, "inside", None), (16, True, "inside", "bfloat16"), (32, True, "shift", "float16")))]


def told(ways):
    return ways["frozen"].to_json().__str__()[-22:] + str(ways["weight"].bits) if isinstance(ways, dict) else str(ways)


def made(ways, keep="recompute", kind=QLinear, noise=0.5, dtype=torch.float32):
    torch.manual_seed(0)
    module = (nn.Linear(64, 16) if kind is QLinear else Conv1D(16, 64)).to(dtype)
    layer = kind.of(module, Slots(keep=keep, **ways))
    layer = layer.double() if dtype == torch.float64 else layer
    nn.init.normal_(layer.adapter.b, std=noise)
    return layer


def run(layer, x=X):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    layer(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters()} | {"x": x.grad}


# ---- what is stored --------------------------------------------------------------------------------------------------------------------------------

@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([2, 3, 4, 6, 7]), st.sampled_from([None, 8, 16]), st.booleans())
def test_float_places_start_as_round_to_nearest_and_fixed_ones_within_half_of_their_unit(seed, bits, group, symmetric):
    module, quant = nn.Linear(32, 8), places_weight(bits, group, symmetric, None)
    module.weight.data = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
    plain = quant.build().initialise(module.weight)
    exact = QLinear.of(module, Slots(quant, frozen=Places("float32")))
    assert torch.equal(exact.computed(), plain(module.weight)) and torch.equal(exact.hard(), exact.quantize().dequantize())
    fixed = QLinear.of(module, Slots(quant, frozen=Places()))
    u = [layer.weight_quantizer.moved(layer.matrix(), None) for layer in (exact, fixed)]
    assert fixed.weight.dtype == torch.int8 and "weight" not in dict(fixed.named_parameters())
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    zero = 0 if symmetric else (exact.weight_quantizer.zero.detach().round() + low).unsqueeze(-1)
    place = quant.grain.view(u[0]) + zero
    inside = (place >= low) & (place <= high)
    off = quant.grain.view(u[1] - u[0]).abs()
    assert (off[inside] <= 2.0 ** (bits - 9) + 1e-5).all() and inside.any()
    assert torch.equal(fixed.computed(), fixed.quantize().dequantize())


@pytest.mark.parametrize("ways", WAYS, ids=told)
@pytest.mark.parametrize("kind", [QLinear, QTransposed])
def test_what_is_computed_is_what_is_packed_and_the_adapter_is_in_the_codes(ways, kind):
    layer = made(ways, kind=kind)
    y, w = layer(X), layer.computed().detach()
    assert torch.equal(w, layer.quantize().dequantize()) and torch.equal(layer.unmatrix(w), layer.hard())
    packed = layer.pack()
    assert torch.equal(packed(X), y) and packed.adapter is None and not any("adapter" in name for name in packed.state_dict())
    again = type(packed).from_meta(packed.to_meta())
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again(X), y)
    assert from_json(layer.slots.to_json()) == layer.slots


@pytest.mark.parametrize("ways", WAYS, ids=told)
def test_merging_keeps_codes_and_output(ways):
    layer = made(ways)
    codes, y, stored = layer.quantize().codes, layer(X), layer.weight.dtype
    layer.merge()
    assert layer.adapter is None and torch.equal(layer.quantize().codes, codes) and torch.equal(layer(X), y)
    assert layer.weight.dtype == (stored if isinstance(ways["frozen"], Places) else torch.float32)
    assert ("weight" in dict(layer.named_parameters())) == isinstance(ways["frozen"], Cast)


def test_an_adapter_after_the_quantizer_does_not_merge_and_the_layer_stays_as_it_was():
    layer = made({"weight": QUANTS[0], "adapter": Lora(4, 2.0, "after"), "frozen": Places()})
    before = layer(X)
    with pytest.raises(QuantError, match="does not merge"):
        layer.merge()
    assert torch.equal(layer(X), before) and layer.adapter is not None


def test_places_hold_any_assignment_of_codes_when_the_rank_is_full():
    layer = made({"weight": QUANTS[0], "adapter": Lora(16, 16.0, "shift"), "frozen": Places("float32")})
    wanted = torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(1)).float()
    with torch.no_grad():
        layer.adapter.a.copy_(wanted - layer.matrix())
        layer.adapter.b.copy_(torch.eye(16))
    assert torch.equal(layer.quantize().values(), wanted)


def test_a_zero_that_moved_shifts_the_window_and_no_value_inside_it():
    layer = made({"weight": places_weight(4, None, False, None), "adapter": Lora(4, 0.0, "shift"), "frozen": Places()})
    before, q = layer.computed().detach(), layer.quantize()
    with torch.no_grad():
        layer.weight_quantizer.zero.add_(2.0)
    after, moved = layer.computed().detach(), layer.quantize()
    inside = (q.values() < 14) & (q.values() > 0)
    torch.testing.assert_close(after[inside], before[inside])
    assert (moved.values() == 15).any() and not torch.equal(after, before)
    layer.merge()
    assert torch.equal(layer.computed(), after) and layer.weight.dtype == torch.int8


def test_quantizers_that_are_off_or_let_in_give_the_weight_before_rounding():
    layer = made({"weight": QUANTS[0], "adapter": Lora(4, 0.0, "shift"), "frozen": Places()})
    whole, latent = layer.computed().detach(), layer.latent()
    module = nn.Linear(64, 16)
    torch.manual_seed(0)
    module.reset_parameters()
    assert (latent - module.weight).abs().max() <= 0.6 * 2.0 ** (4 - 8) * layer.weight_quantizer.scale.max()
    layer.weight_quantizer.blend = 0.25
    torch.testing.assert_close(layer.computed(), latent + 0.25 * (whole - latent))
    layer.weight_quantizer.on = False
    assert torch.equal(layer.computed(), latent)


# ---- gradients -------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ways", WAYS, ids=told)
def test_recomputing_changes_no_gradient(ways):
    grads = [run(made(ways, keep)) for keep in ("each", "recompute", "buffer")]
    for other in grads[1:]:
        assert set(other) == set(grads[0]) and all(torch.equal(other[name], grads[0][name]) for name in other)


@pytest.mark.parametrize(("symmetric", "group"), itertools.product((True, False), (None, 16)))
def test_places_hear_their_closed_forms(symmetric, group):
    quant = places_weight(3, group, symmetric, None)
    layer = made({"weight": quant, "adapter": Lora(4, 2.0, "shift"), "frozen": Places("float32")}, noise=8.0, dtype=torch.float64)
    x = X.double().flatten(0, 1).requires_grad_()
    layer(x).square().sum().backward()
    g = 2 * layer(x).detach().T @ x.detach()                      # dL/dw_hat
    view, q = quant.grain.view, layer.weight_quantizer
    s, z = q.scale.detach().double().unsqueeze(-1), 0 if symmetric else q.zero.detach().double().unsqueeze(-1)
    place = (view(layer.weight + layer.adapter.update().detach()) + z).round()
    low, high = quant.grid.low, quant.grid.high
    mask = (place >= low) & (place <= high)
    gs = quant.grain.back(view(g) * s * mask, g.shape)
    torch.testing.assert_close(layer.adapter.b.grad, 0.5 * gs @ layer.adapter.a.detach().T)
    torch.testing.assert_close(layer.adapter.a.grad, 0.5 * layer.adapter.b.detach().T @ gs)
    torch.testing.assert_close(q.scale.grad, (view(g) * (place.clamp(low, high) - z)).sum(-1).to(q.scale.dtype))
    if not symmetric:
        torch.testing.assert_close(q.zero.grad, -(view(g) * s * ~mask).sum(-1).to(q.zero.dtype))
    assert 0 < mask.double().mean() < 1


# ---- memory ----------------------------------------------------------------------------------------------------------------------------------------

def saved_shapes(layer):
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        layer(X.clone().requires_grad_())
    home = layer.weight.untyped_storage().data_ptr()
    return [t for t in found if sorted(t.shape[-2:]) == [16, 64] and t.untyped_storage().data_ptr() != home], \
           [t for t in found if t.untyped_storage().data_ptr() == home]


@pytest.mark.parametrize("ways", WAYS, ids=told)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_nothing_of_the_weights_shape_is_saved_but_the_store(ways, precision):
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        others, store = saved_shapes(made(ways))
        assert not others and store
        assert saved_shapes(made(ways, "each"))[0], "without recomputing there would be some"


def test_the_master_is_free_once_the_model_is_quantized():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).to(torch.bfloat16)
    masters = [weakref.ref(model[i].weight) for i in (0, 2)]
    tensors = [weakref.ref(model[i].weight.untyped_storage()) for i in (0, 2)]
    quantize(model, [Rule("*", weight=places_weight(4, None, True, None), adapter=Lora(2, 1.0, "shift"), frozen=Places(), keep="recompute")])
    gc.collect()
    assert [ref() for ref in (*masters, *tensors)] == [None] * 4
    large = [t for t in (*model.parameters(), *model.buffers()) if t.numel() >= 16 * 32]
    assert len(large) == 2 and all(t.dtype == torch.int8 for t in large) and model[0].bias.dtype == torch.bfloat16
    assert model(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_store_that_was_written_between_forward_and_backward_is_no_silent_error():
    layer = made(WAYS[0])
    y = layer(X).sum()
    layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified"):
        y.backward()


def test_a_convolution_may_be_frozen():
    torch.manual_seed(0)
    conv, x, grads = nn.Conv2d(4, 8, 3, padding=1), torch.randn(2, 4, 6, 6), []
    for keep in ("each", "recompute"):
        layer = QConv2d.of(conv, Slots(l4q_weight(4, None, "covering", False, False, None), frozen=Cast(), keep=keep))
        layer(x).square().sum().backward()
        grads.append((layer.weight_quantizer.scale.grad, layer.bias.grad.clone()))
        layer.bias.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- files -----------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ways", [WAYS[0], WAYS[10], WAYS[-2]], ids=told)
def test_a_model_in_training_survives_save_pretrained(ways, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = quantize(LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=64, **sizes)),
                     [*keep_full("@embedding", "@head"), Rule("*", keep="recompute", **ways)]).eval()
    from qatlas.model import hub
    hub.adopt(model, hub.in_training(model))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2) if p.dim() == 2 and min(p.shape) == 4 else None
    ids = torch.arange(20).view(2, 10)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    layer = again.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == model.model.layers[0].mlp.up_proj.weight.dtype and "weight" not in dict(layer.named_parameters())
    assert torch.equal(again(ids).logits, model(ids).logits)


# ---- what is refused -------------------------------------------------------------------------------------------------------------------------------

W = places_weight(4, None, True, None)


@pytest.mark.parametrize(("slots", "words"), [
    ({"weight": places_weight(8, None, True, None), "frozen": Places()}, "places of 2 to 7 bits"),
    ({"weight": Quant(Uniform(4), PerChannel(), AbsMax(), Clip()), "frozen": Places()}, "learned step"),
    ({"weight": Quant(HalfStep(2), PerChannel(), Learned()), "frozen": Places()}, "whole numbers"),
    ({"weight": W.but(refit=True), "frozen": Places()}, "refit"),
    ({"weight": W, "frozen": Places(), "transform": Hadamard()}, "rotated"),
    ({"frozen": Places()}, "no one"),
    ({"weight": Rows((W, W)), "frozen": Places()}, "grid"),
])
def test_what_places_cannot_be(slots, words):
    with pytest.raises((QuantError, AttributeError), match=words):
        QLinear.of(nn.Linear(64, 16), Slots(**slots))


def test_names_of_forms_and_tied_weights():
    with pytest.raises(QuantError, match="'int3'.*fixed, integer"):
        Places("int3")
    with pytest.raises(QuantError, match="'int8'.*float32"):
        Cast("int8")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    with pytest.raises(RuleError, match="share one weight, which cannot be frozen"):
        quantize(model, [Rule("*", weight=W, frozen=Places())])


def test_a_frozen_layer_without_numbers_is_plain_lora():
    layer = QLinear.of(nn.Linear(64, 16), Slots(adapter=Lora(4, 4.0, "beside"), frozen=Cast()))
    nn.init.normal_(layer.adapter.b)
    torch.testing.assert_close(layer(X), F.linear(X, layer.weight + layer.adapter.update(), layer.bias), rtol=1e-4, atol=1e-4)
    assert {name for name, _ in layer.named_parameters()} == {"bias", "adapter.a", "adapter.b"}
