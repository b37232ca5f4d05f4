"""Groups by role; globs that fit nothing are errors; what is not trained is frozen."""

import pytest
import torch
from tiny import llama, quantized, task
from torch import nn

from qatlas.core.error import RuleError
from qatlas.core.noun import from_json
from qatlas.train.fit import fit
from qatlas.train.optim import SGD, AdamW, BertAdam, only, set_rates, trained


def test_groups_by_role():
    model = quantized(llama(), "w2")
    names = trained(model, "*")
    groups = {g["role"]: g for g in AdamW(1e-3, 0.1, 1e-5).build(model, names).param_groups}
    found = {role: sorted(names[p] for p in g["params"]) for role, g in groups.items()}
    assert all(name.endswith("weight_quantizer.scale") for name in found["scales"]) and len(found["scales"]) == 14
    assert all("norm" in name for name in found["norms"]) and len(found["norms"]) == 5
    assert len(found["weights"]) == 14 + 2
    assert {role: (g["lr"], g["weight_decay"]) for role, g in groups.items()} == {"weights": (1e-3, 0.1), "norms": (1e-3, 0.0), "scales": (1e-5, 0.0)}


def test_a_bias_does_not_decay_nor_does_a_norm_called_scale():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Norm()})
    roles = {g["role"]: len(g["params"]) for g in SGD().build(model, trained(model, "*")).param_groups}
    assert roles == {"weights": 1, "norms": 2}


def test_specs_are_values():
    for spec in (AdamW(1e-3, betas=(0.9, 0.95)), SGD(momentum=0.5)):
        assert from_json(spec.to_json()) == spec
    assert isinstance(SGD().build(nn.Linear(2, 2), trained(nn.Linear(2, 2), "*")), torch.optim.SGD)


def test_a_glob_that_fits_nothing_is_an_error_with_the_nearest_names():
    with pytest.raises(RuleError, match="nearest names: .*down_proj"):
        fit(llama(), task(), train=["*norm*", "model.layers.0.mlp.dwn_proj.weight"], steps=1)


def test_what_is_not_trained_is_frozen_and_gets_its_flag_back():
    model = llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.lm_head.weight.requires_grad_(False)
    fit(model, task(), train="*norm*", steps=2, optimizer=AdamW(1e-2))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("norm" in name), name
        assert p.requires_grad == (name != "lm_head.weight") and p.grad is None


def test_tied_parameters_are_found_under_each_name():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    assert list(trained(model, "b.*").values()) == ["a.weight"]


def test_only_some_groups_step():
    model = nn.Linear(2, 2)
    optimizer = SGD(0.1).build(model, trained(model, "*"))
    model(torch.ones(1, 2)).sum().backward()
    weight, bias = model.weight.clone(), model.bias.clone()
    with only(optimizer, ("norms",)):
        optimizer.step()
    assert torch.equal(model.weight, weight) and not torch.equal(model.bias, bias) and model.weight.grad is not None


def test_a_relative_rate_follows_the_size_of_its_scale():
    model = quantized(llama(), "w4")
    optimizer = AdamW(1e-3, scale_share=0.01).build(model, trained(model, "*"))
    set_rates(optimizer, 0.5)
    shares = [group for group in optimizer.param_groups if group.get("relative")]
    assert len(shares) == 14 and {group["role"] for group in optimizer.param_groups} == {"weights", "norms", "scales"}
    for group in shares:
        assert group["lr"] == pytest.approx(0.005 * float(group["params"][0].detach().abs().mean()), rel=1e-6)
    assert all(group["lr"] == 5e-4 for group in optimizer.param_groups if not group.get("relative"))


def test_bert_adam_by_hand():
    """No bias correction, each gradient clipped by itself, decoupled decay; what has no gradient rests."""
    model = nn.Linear(2, 1).double()
    other = nn.Parameter(torch.ones(1, 1).double())
    model.register_parameter("idle", other)
    w, b = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = BertAdam(lr=0.1, weight_decay=0.01).build(model, trained(model, "*"))
    m, v = torch.zeros(1, 2).double(), torch.zeros(1, 2).double()
    for g in (torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[0.3, 0.4]]).double()):
        optimizer.zero_grad()
        model.weight.grad, model.bias.grad = g.clone(), torch.tensor([0.5]).double()
        optimizer.step()
        cut = g / max(1.0, float(g.norm()) + 1e-6)
        m, v = 0.9 * m + 0.1 * cut, 0.999 * v + 0.001 * cut**2
        w = w - 0.1 * (m / (v.sqrt() + 1e-6) + 0.01 * w)
    torch.testing.assert_close(model.weight.detach(), w, rtol=1e-5, atol=1e-8)
    assert other.item() == 1.0 and model.bias.item() < b.item()
    assert from_json(BertAdam().to_json()) == BertAdam()
