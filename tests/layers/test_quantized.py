"""The three ways to keep a quantized weight agree bit for bit, forward and backward, after every kind of write; packed equals trained."""

import itertools
import json

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qatlas.core.error import QuantError
from qatlas.core.grain import Group, PerChannel
from qatlas.core.grid import Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, Learned, MinMax, Moving
from qatlas.core.scheme import scheme, weight
from qatlas.core.transform import Chain, Hadamard, Permute, Smooth
from qatlas.layers.adapter import Lora
from qatlas.layers.conv import QConv1d, QConv2d
from qatlas.layers.embedding import QEmbedding
from qatlas.layers.linear import QLinear, QTransposed
from qatlas.layers.packed import Packed
from qatlas.layers.quantized import KEEP, Slots

A8 = scheme("w4a8").input
X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
TRANSFORMS = [None, Hadamard(seed=1), Smooth(), Permute(), Chain((Smooth(), Hadamard()))]
ADAPTERS = [None, *(Lora(4, 8.0, place) for place in ("inside", "shift", "after", "beside"))]
WEIGHTS = [weight(4), weight(1.58), weight(1), Quant(Uniform(4, False), Group(16), MinMax()),
           Quant(Uniform(3), PerChannel(), Learned(MinMax(zero="offset")))]


def make(quant, keep="each", transform=None, adapter=None, dtype=torch.float32):
    torch.manual_seed(0)
    layer = QLinear.of(nn.Linear(64, 16).to(dtype), Slots(quant, A8, transform=transform, adapter=adapter, keep=keep), X.abs().amax((0, 1)))
    if adapter is not None:
        nn.init.normal_(layer.adapter.b)
    return layer


def run(layer):
    layer.zero_grad()
    y = layer(X)
    y.square().mean().backward()
    return y.detach(), {name: p.grad.clone() for name, p in layer.named_parameters()}


@pytest.mark.parametrize(("quant", "transform", "adapter"), itertools.product(WEIGHTS, TRANSFORMS[:3:2], ADAPTERS))
def test_buffer_and_recompute_equal_each(quant, transform, adapter):
    y, grads = run(make(quant, "each", transform, adapter))
    for keep in KEEP[1:]:
        layer = make(quant, keep, transform, adapter)
        for _ in range(2):                                        # the second time from the buffer
            again, found = run(layer)
            assert torch.equal(again, y)
            assert all(torch.equal(found[name], grads[name]) for name in grads), keep


def writes(layer):
    yield lambda: torch.optim.AdamW(layer.parameters(), lr=0.1).step()
    yield lambda: torch.optim.SGD(layer.parameters(), lr=0.1, foreach=True).step()
    yield lambda: layer.load_state_dict({name: t + 0.05 for name, t in layer.state_dict().items()})

    def data():
        layer.weight.data.mul_(1.3)
        layer.refresh()
    yield data
    if layer.weight_quantizer.scale is not None:
        def scale():
            with torch.no_grad():
                layer.weight_quantizer.scale.mul_(1.1)
        yield scale
    if layer.adapter is not None:
        def adapter():
            with torch.no_grad():
                layer.adapter.b.add_(0.1)
        yield adapter


@pytest.mark.parametrize(("quant", "adapter"), itertools.product(WEIGHTS, ADAPTERS[:3]))
def test_a_buffer_is_fresh_after_every_kind_of_write(quant, adapter):
    layer = make(quant, "buffer", None, adapter)
    run(layer)
    for write in writes(layer):
        write()
        kept = layer.computed().detach().clone()
        layer.keep = "each"
        assert torch.equal(kept, layer.computed())
        layer.keep = "buffer"
        run(layer)


@pytest.mark.parametrize("keep", KEEP)
def test_what_is_saved_for_backward(keep):
    layer = make(weight(4), keep)
    layer(X)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(X.clone().requires_grad_())
    fresh = {t.untyped_storage().data_ptr() for t in saved if t.numel() == layer.weight.numel()} - {layer.weight.untyped_storage().data_ptr()}
    assert len(fresh) == (0 if keep == "recompute" else 1)       # recompute: nothing of the weight's size but the weight itself


def test_a_write_between_forward_and_backward_is_no_silent_error():
    layer = make(weight(4), "recompute")
    y = layer(X).sum()
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="written|modified"):
        y.backward()


@pytest.mark.parametrize("keep", KEEP)
def test_autocast_computes_in_bf16_with_fp32_masters(keep):
    layer = make(weight(4), keep)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(X)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.weight.grad.dtype == layer.weight_quantizer.scale.grad.dtype == torch.float32
    assert make(weight(4), dtype=torch.bfloat16).weight.dtype == torch.float32


@pytest.mark.parametrize(("quant", "transform", "adapter"), itertools.product(WEIGHTS, TRANSFORMS, ADAPTERS))
def test_packed_equals_trained_and_survives_its_meta(quant, transform, adapter):
    layer = make(quant, "each", transform, adapter)
    packed = layer.pack()
    assert torch.equal(packed(X), layer(X))
    again = Packed.from_meta(json.loads(json.dumps(packed.to_meta())))
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again(X), packed(X))
    assert torch.equal(packed.computed(), layer.computed())


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_hard_lives_in_the_weights_own_space(transform):
    layer = make(weight(8), "each", transform)
    assert (layer.hard() - layer.weight).abs().max() < 0.05
    if transform is None:
        assert torch.equal(layer.hard(), layer.quantize().dequantize())


@pytest.mark.parametrize("place", ["inside", "shift"])
@pytest.mark.parametrize("quant", [WEIGHTS[0], WEIGHTS[4]])
def test_merging_an_adapter_keeps_codes_and_output(place, quant):
    layer = make(quant, adapter=Lora(4, 8.0, place))
    before, codes = layer(X), layer.quantize().codes
    layer.merge()
    assert layer.adapter is None
    assert torch.equal(layer.quantize().codes, codes)
    assert (layer(X) - before).abs().max() <= 1e-5


def test_merging_into_a_measured_scale_would_move_codes_and_is_refused():
    layer = make(WEIGHTS[3], adapter=Lora(4, 8.0, "shift"))
    before, _ = run(layer)
    with pytest.raises(QuantError, match="would move codes"):
        layer.merge()
    assert torch.equal(run(layer)[0], before)


@pytest.mark.parametrize("place", ["after", "beside"])
def test_adapters_that_no_grid_can_hold_do_not_merge(place):
    with pytest.raises(QuantError, match="does not merge"):
        make(weight(4), adapter=Lora(4, 8.0, place)).merge()


@pytest.mark.parametrize("place", ["inside", "shift", "after", "beside"])
def test_a_fresh_adapter_moves_nothing(place):
    layer = make(weight(4), adapter=Lora(4, 8.0, place))
    nn.init.zeros_(layer.adapter.b)
    assert torch.equal(layer(X), make(weight(4))(X))


def test_convolutions_embeddings_and_transposed_linears():
    for conv, x, cls in ((nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"), torch.randn(2, 8, 6, 6), QConv2d),
                         (nn.Conv1d(8, 4, 3, stride=2, padding="valid", groups=2), torch.randn(2, 8, 9), QConv1d)):
        layer = cls.of(conv, Slots(weight(4), A8))
        assert torch.equal(layer.pack()(x), layer(x))
        again = Packed.from_meta(json.loads(json.dumps(layer.pack().to_meta())))
        again.load_state_dict(layer.pack().state_dict())
        assert torch.equal(again(x), layer(x))
    table = QEmbedding.of(nn.Embedding(10, 32, padding_idx=0), Slots(weight(8)))
    assert torch.equal(table.pack()(torch.arange(5)), table(torch.arange(5)))
    with pytest.raises(QuantError, match="has ids as input"):
        QEmbedding.of(nn.Embedding(10, 32), Slots(weight(8), A8))
    turned = QTransposed.of(Conv1D(6, 64), Slots(weight(4)))
    assert turned.hard().shape == turned.weight.shape == (64, 6) and turned.quantize().codes.shape == (6, 64)
    assert torch.equal(turned.pack().computed(), turned.hard().T)


def test_a_buffer_hears_of_other_bits():
    layer = make(weight(4), "buffer")
    layer(X)
    layer.weight_quantizer.quant = layer.weight_quantizer.quant.but(grid=Uniform(2))
    assert torch.equal(layer.computed(), layer.hard()) and torch.equal(layer.computed(), layer.quantize().dequantize())


def test_bad_slots():
    with pytest.raises(QuantError, match="each, buffer, recompute"):
        Slots(keep="forever")
    with pytest.raises(QuantError, match="linear layers only"):
        QConv2d.of(nn.Conv2d(4, 4, 3), Slots(weight(4), transform=Hadamard()))
    with pytest.raises(QuantError, match="places are"):
        Lora(place="outside")
    with pytest.raises(QuantError, match="full precision"):
        QLinear.of(nn.Linear(8, 8), Slots(input=A8)).quantize()


def test_static_scales_start_from_absmax():
    quant = Quant(Uniform(8), PerChannel(), Learned(AbsMax()))
    layer = QLinear.of(nn.Linear(64, 16), Slots(quant))
    assert torch.equal(layer.weight_quantizer.scale, layer.weight.detach().abs().amax(1) / 127)


def test_hooks_can_be_registered_on_a_made_layer():
    layer, seen = QLinear.of(nn.Linear(64, 8), Slots(weight(4))), []
    handle = layer.register_forward_hook(lambda m, x, y: seen.append(tuple(y.shape)))
    layer(X)
    handle.remove()
    layer(X)
    assert seen == [(3, 5, 8)]


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_computes_in_it_from_fp32_masters(keep, kind):
    layer = make(weight(4), keep, dtype=kind)
    y = layer(X.to(kind))
    y.sum().backward()
    assert y.dtype == layer.bias.dtype == kind and layer.weight.grad.dtype == torch.float32
    assert torch.equal(layer.pack()(X.to(kind)), y)


def test_a_kept_weight_moves_with_its_layer():
    """`.to` writes through `.data`, which no version counter sees; a buffer left behind on the old device would stay there for good."""
    layer = make(weight(4), "buffer")
    layer(X)
    layer.double()
    assert layer._keep(layer.source(), None).value.dtype == torch.float64
    layer.float().to("meta")
    layer.refresh()
    assert layer.computed().device.type == "meta"


def test_a_moving_scale_keeps_no_buffer():
    layers = [make(Quant(Uniform(4), PerChannel(), Moving(AbsMax(), 0.5)), keep) for keep in ("each", "buffer")]
    for _ in range(3):
        one, two = (run(layer)[0] for layer in layers)
        assert torch.equal(one, two)
        for layer in layers:
            layer.weight.data.mul_(1.5)
            layer.refresh()


@pytest.mark.parametrize("more", [{"max_norm": 1.0}, {"sparse": True}])
def test_an_embedding_that_no_quantizer_serves_is_refused(more):
    with pytest.raises(QuantError, match="max_norm=None and sparse=False"):
        QEmbedding.of(nn.Embedding(8, 64, **more), Slots(weight=weight(4)))


def test_a_layer_compiles_in_one_graph():
    layer = make(weight(4))
    y, grads = run(layer)
    again, found = run(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    assert torch.equal(again, y) and all(torch.equal(found[f"_orig_mod.{name}"], grad) for name, grad in grads.items())
