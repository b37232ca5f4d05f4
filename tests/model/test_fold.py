"""Batch norms fold into what is in front of them, provably; what does not fit is refused by name and nothing has moved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qatlas.core.error import CheckpointError, QuantError
from qatlas.core.estimator import Clip
from qatlas.core.grain import Group, PerChannel, PerTensor
from qatlas.core.grid import Ternary, Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, AbsMean, Learned
from qatlas.model import hub
from qatlas.model.fold import blank, fold, folded
from qatlas.model.pack import load_into, load_packed, pack, save
from qatlas.model.rules import Rule, quantize
from qatlas.model.zoo.resnet import resnet

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def used(norm, seed=0):
    """A norm that has seen something: gains of both signs."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value, shift in ((norm.weight, -0.4), (norm.bias, -0.5), (norm.running_mean, -0.5), (norm.running_var, 0.5)):
            value.copy_(torch.rand(value.shape, generator=draw) + shift)
    assert (norm.weight < 0).any() and (norm.weight > 0).any()
    return norm


def net(*, bias=False, inplace=False, groups=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, bias=bias), used(nn.BatchNorm2d(6)), nn.ReLU(inplace), nn.Conv2d(6, 6, 3, groups=groups),
                         used(nn.BatchNorm2d(6), 1), nn.Flatten(), nn.Linear(96, 8), used(nn.BatchNorm1d(8), 2)).eval()


class Wired(nn.Module):
    """conv, norm and one way in which they do not belong together."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.conv, self.other = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.norm, self.second = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.conv(x)
        if self.how == "shared":
            return self.norm(y) + self.norm(self.other(x))
        if self.how == "activation":
            return self.norm(self.act(y))
        if self.how == "between":
            return self.norm(y + 1)
        if self.how == "shortcut":
            return self.norm(y) + y
        if self.how == "twice":
            return self.norm(y) + self.conv(x * 2)
        if self.how == "two":
            return self.norm(y) + self.second(y)
        if self.how == "never":
            return y
        return self.norm(x if self.how == "first" else y)


@pytest.mark.parametrize("bias, inplace, groups", [(False, False, 1), (True, True, 1), (False, True, 3)])
def test_the_output_stays(bias, inplace, groups):
    model = net(bias=bias, inplace=inplace, groups=groups)
    before = model(X)
    assert fold(model, X) is model and folded(model) == {"1": "0", "4": "3", "7": "6"}
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert (model(X) - before).abs().max() < 1e-5 * before.abs().max()


def test_a_weight_in_closed_form():
    model = net()
    conv, norm = model[0], model[1]
    r = norm.weight / (norm.running_var + norm.eps).sqrt()
    want, bias = conv.weight * r.view(-1, 1, 1, 1), norm.bias - r * norm.running_mean
    fold(model, X)
    assert torch.allclose(conv.weight, want, rtol=1e-6) and torch.allclose(conv.bias, bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how, words", [
    ("shared", r"norm: it serves 2 places"), ("activation", "norm: its input is no module's output as it came"),
    ("between", "norm: its input is no module's output as it came"), ("twice", "norm: conv gives its output, or its weight, to more than"),
    ("two", "second: conv gives its output"), ("never", "norm: the probe forward never called it"), ("first", "norm: its input is no module's")])
def test_what_does_not_stand_behind_a_layer_is_refused_by_name(how, words):
    model = Wired(how) if how != "first" else nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3))
    if how == "first":
        words = words.replace("norm:", "0:")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(QuantError, match=words):
        fold(model, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and folded(model) == {}


def test_a_shortcut_past_the_norm_shows_itself():
    """Even of a fresh norm, whose folding would change almost nothing today."""
    model = Wired("shortcut")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(QuantError, match=r"moves the output: norm \(by .*shortcut"):
        fold(model, X, "norm")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and isinstance(model.norm, nn.BatchNorm2d)


def test_names_say_which():
    model = net()
    fold(model, X, "4")
    assert folded(model) == {"4": "3"} and isinstance(model[1], nn.BatchNorm2d)
    fold(model, X)
    assert folded(model) == {"1": "0", "4": "3", "7": "6"}
    with pytest.raises(QuantError, match="no batch norm '\\*'; it has none"):
        fold(model, X)
    with pytest.raises(QuantError, match="no batch norm 'bn'; it has 1, 4, 7"):
        fold(net(), X, "bn")


@pytest.mark.parametrize("norm, front, words", [
    (nn.BatchNorm2d(6, track_running_stats=False), nn.Conv2d(3, 6, 3), "no running statistics"),
    (nn.BatchNorm2d(6), nn.ConvTranspose2d(3, 6, 3), "ConvTranspose2d.*no convolution and no linear"),
    (nn.SyncBatchNorm(6), nn.Conv2d(3, 6, 3), "SyncBatchNorm is not known")])
def test_other_norms_and_layers(norm, front, words):
    with pytest.raises(QuantError, match=words):
        fold(nn.Sequential(front, norm), X)


def test_a_linear_layer_with_tokens():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    with pytest.raises(QuantError, match="normalises axis 1 of what 0 gives"):
        fold(model, torch.randn(2, 4, 5))


def learned(grid, grain=None):
    scale = AbsMean(1.0) if isinstance(grid, Ternary) else AbsMean(2.0, per_root=True)
    return Quant(grid, grain or PerChannel(), Learned(scale), Clip())


@pytest.mark.parametrize("quant", [learned(Uniform(4, narrow=True)), learned(Ternary()), Quant(Uniform(3, narrow=True), PerChannel(), AbsMax()),
                                   learned(Uniform(4, narrow=True), Group(3))], ids=str)
def test_after_training_the_codes_stay_but_for_their_sign(quant):
    model = quantize(net(), [Rule("*", weight=quant)])
    codes = [model[i].quantize().values() for i in (0, 3, 6)]
    signs = [model[i + 1].weight.sign() for i in (0, 3, 6)]
    before = model(X)
    fold(model, X)
    for i, v, sign in zip((0, 3, 6), codes, signs, strict=True):
        assert torch.equal(model[i].quantize().values(), v * sign.view(-1, *[1] * (v.dim() - 1)))
        assert (model[i].quantize().steps > 0).all()
    assert (model(X) - before).abs().max() < 1e-5 * before.abs().max()


@pytest.mark.parametrize("quant, words", [
    (learned(Uniform(4)), r"gamma of \d channels is negative.*has -8 and no 8.*Uniform\(4, narrow=True\)"),
    (learned(Uniform(4, narrow=True), PerTensor()), "one step for several channels")])
def test_after_training_what_would_move_a_code_is_refused(quant, words):
    model = quantize(net(), [Rule("*", weight=quant)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(QuantError, match=words):
        fold(model, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and isinstance(model[1], nn.BatchNorm2d)


def test_after_training_a_wide_grid_takes_positive_gains():
    model = net()
    for i in (1, 4, 7):
        model[i].weight.data.abs_()
    quantize(model, [Rule("*", weight=learned(Uniform(4)))])
    v = model[0].quantize().values()
    assert torch.equal(fold(model, X)[0].quantize().values(), v)


def test_after_training_a_gain_of_nothing_and_a_quantizer_between():
    model = net()
    model[1].weight.data[2] = 0
    with pytest.raises(QuantError, match="gamma of channel 2 is 0"):
        fold(quantize(model, [Rule("*", weight=learned(Ternary()))]), X)
    model = quantize(net(), [Rule("0:output", signal=Quant(Uniform(8), PerTensor(), AbsMax())), Rule("*", weight=learned(Ternary()))])
    with pytest.raises(QuantError, match="1: a quantizer stands between: 0.output_quantizer"):
        fold(model, X)
    with pytest.raises(QuantError, match="0 is packed"):
        fold(pack(quantize(net(), [Rule("*", weight=learned(Ternary()))])), X)


def test_a_transformers_model_goes_to_disk_and_back(tmp_path):
    torch.manual_seed(0)
    model = resnet()
    for at, norm in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        used(norm, at)
    x = torch.randn(2, 3, 32, 32)
    before = model(x).logits
    fold(model)
    assert (model(x).logits - before).abs().max() < 1e-5 * before.abs().max()
    quantize(model, "w4")
    hub.adopt(model, hub.in_training(model))
    model.save_pretrained(tmp_path / "trainable")
    again = type(model).from_pretrained(tmp_path / "trainable")
    assert torch.equal(again.eval()(x).logits, model.eval()(x).logits) and folded(again) == folded(model)
    save(pack(model), tmp_path / "packed")
    assert torch.equal(load_packed(tmp_path / "packed")(x).logits, model(x).logits)
    assert torch.equal(load_into(resnet(), tmp_path / "packed")(x).logits, model(x).logits)


def test_a_file_that_folds_what_is_not_there():
    with pytest.raises(CheckpointError, match="folds '9' into '0'"):
        blank(net(), {"9": "0"})


def test_a_file_of_another_model_leaves_the_norms(tmp_path):
    save(pack(quantize(fold(net(), X), "w4")), tmp_path / "packed")
    model = net()
    model[6] = nn.Linear(96, 9)
    with pytest.raises(CheckpointError):
        load_into(model, tmp_path / "packed")
    assert isinstance(model[1], nn.BatchNorm2d) and model[0].bias is None and folded(model) == {}
