"""Mixtures of experts through the whole house: rules, coverage, training, files; closed where no rule reached, refused where no format holds them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from qatlas.core.error import CheckpointError, FormatError, QuantError, RuleError
from qatlas.core.grain import PerChannel
from qatlas.core.qtensor import QTensor
from qatlas.core.scheme import weight
from qatlas.core.transform import Smooth
from qatlas.layers.experts import Experts, PackedStack, QStack
from qatlas.model import hub, mixture
from qatlas.model.coverage import describe
from qatlas.model.further import unpack
from qatlas.model.pack import checkpoint, load_into, load_packed, pack, save
from qatlas.model.roles import Role, roles
from qatlas.model.rules import Rule, keep_full, of_scheme, quantize

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
IDS = torch.arange(24).view(2, 12) * 7 % 60 + 1
EXPERTS = "model.layers.0.mlp.experts"


def mixtral(experts: int = 4) -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZE, num_local_experts=experts)).eval()


def qwen3() -> Any:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)).eval()


@pytest.mark.parametrize("make", [mixtral, qwen3])
@pytest.mark.parametrize("text", ["w4a8", "w1.58-tensor", "w2-g16", "w1"])
def test_a_mixture_is_quantized_trained_packed_saved_and_loaded(make: Any, text: str, tmp_path: Path) -> None:
    model = quantize(make(), text)
    cover = describe(model, {"input_ids": IDS}).check()
    stacks = {row.name: row for row in cover.rows if row.layer == "QStack"}
    assert set(stacks) == {f"model.layers.{i}.mlp.experts.{part}_proj" for i in (0, 1) for part in ("gate_up", "down")}
    assert all(row.calls == (1, 1) and row.bits < 5 and row.role == "@linear" for row in stacks.values())
    matrices = sum(p.numel() for name, p in make().named_parameters() if p.dim() > 1 and ".gate.weight" not in name)
    assert matrices == sum(torch.Size(row.shape).numel() for row in cover.rows), "every matrix but the routers is in the table"
    before, optimizer, losses = model.model.layers[0].mlp.experts.down_proj.weight.clone(), torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(4):
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not torch.equal(model.model.layers[0].mlp.experts.down_proj.weight, before)
    with torch.no_grad():
        logits = model.eval()(IDS).logits
        hub.adopt(model, hub.in_training(model))
        model.save_pretrained(tmp_path / "trainable")
        save(model, tmp_path / "packed")
        for other in (AutoModelForCausalLM.from_pretrained(tmp_path / "trainable"), load_packed(tmp_path / "packed"),
                      load_into(make(), tmp_path / "packed"), pack(copy.deepcopy(model))):
            assert torch.equal(other(IDS).logits, logits)
            assert isinstance(other.model.layers[1].mlp.experts.gate_up_proj, QStack | PackedStack)
        assert torch.equal(unpack(other)(IDS).logits, logits) and isinstance(other.model.layers[1].mlp.experts.gate_up_proj, QStack)


def test_each_expert_has_scales_of_its_own() -> None:
    one, other = mixtral(), mixtral()
    with torch.no_grad():
        other.model.layers[0].mlp.experts.down_proj[2] *= 3
    codes = [quantize(m, "w2-tensor").model.layers[0].mlp.experts.down_proj.quantize() for m in (one, other)]
    assert codes[0].steps.numel() == 4 and torch.equal(codes[0].codes, codes[1].codes)
    assert (codes[0].steps != codes[1].steps).flatten().tolist() == [False, False, True, False]


def test_rules_speak_of_stacks_by_name_and_what_none_reached_is_closed_again() -> None:
    model, before = mixtral(), mixtral()(IDS).logits
    quantize(model, [Rule("*.0.mlp.experts.down_proj", weight=weight(8))])
    assert isinstance(model.model.layers[0].mlp.experts, Experts) and type(model.model.layers[1].mlp.experts) is MixtralExperts
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, QStack) and 0 < (model(IDS).logits - before).abs().max() < 0.01
    model = quantize(mixtral(), [*keep_full("*.experts", Role.EMBEDDING, Role.HEAD, Role.ROUTER), Rule("*", weight=weight(4))])
    assert {type(layer.mlp.experts) for layer in model.model.layers} == {MixtralExperts}
    describe(model, {"input_ids": IDS}).check()
    model = mixtral()
    with pytest.raises(RuleError, match=r"down_prij[\s\S]*nearest names: .*experts.down_proj"):
        quantize(model, [Rule(f"{EXPERTS}.down_prij", weight=weight(4))])
    with pytest.raises(QuantError, match=f"{EXPERTS}.gate_up_proj: PerChannel.* run over several experts"):
        quantize(model, [Rule("*.gate_up_proj", weight=weight(4, PerChannel(1)))])
    assert {type(layer.mlp.experts) for layer in model.model.layers} == {MixtralExperts} and torch.equal(model(IDS).logits, before)


def test_routers_have_a_role_and_must_be_named() -> None:
    names = {name for name, role in roles(mixtral()).items() if Role.ROUTER in role}
    assert names == {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    model = quantize(mixtral(), [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*", weight=weight(4))])
    with pytest.raises(RuleError, match=r"2 matrices are reached by no rule, for instance model.layers.0.mlp.gate.weight"):
        describe(model, {"input_ids": IDS}).check()
    model = mixtral()
    for layer in model.model.layers:                              # a router that is a linear layer: a scheme leaves it full
        layer.mlp.gate = nn.Linear(32, 4)
    quantize(model, "w4")
    assert type(model.model.layers[0].mlp.gate) is nn.Linear


def test_experts_of_another_form_are_listed_with_the_reason() -> None:
    torch.manual_seed(0)
    model = quantize(GptOssForCausalLM(GptOssConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2, head_dim=8)).eval(), "w4")
    with pytest.raises(RuleError, match=r"experts.gate_up_proj.*\(GptOssExperts holds more than two stacks of matrices.*keep_full\("):
        describe(model, {"input_ids": IDS}).check()
    assert set(mixture.closed(model)) == {f"model.layers.{i}.mlp.experts" for i in (0, 1)}


def test_transforms_see_the_inputs_of_stacks() -> None:
    class Task:
        """Calibration batches."""

        target, extra_rules = None, ()

        def calibration(self) -> list[Any]:
            return [{"input_ids": IDS}]

    model, before = mixtral(), mixtral()(IDS).logits
    quantize(model, [Rule("*_proj", transform=Smooth())], Task())
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, QStack) and torch.allclose(model(IDS).logits, before, atol=1e-5)


def test_no_format_of_ours_holds_them_and_it_says_so() -> None:
    model = mixtral()
    with pytest.raises(FormatError, match=r"experts.gate_up_proj: gguf:q4_0 has no place for a stack of experts.*keep_full\("):
        quantize(model, [Rule("*.experts.*", weight=weight(4))], target="gguf:q4_0")
    assert type(model.model.layers[0].mlp.experts) is MixtralExperts
    with pytest.raises(QuantError, match=r"4 layers are stacks of experts, for instance model.layers.0.mlp.experts.gate_up_proj"):
        checkpoint(quantize(model, "w4"))
    model = quantize(mixtral(), [*keep_full("*.experts"), *of_scheme("w4")], target="gguf:q4_0")
    assert any(isinstance(t, QTensor) for t in checkpoint(model).tensors.values())


def test_a_file_of_another_mixture_changes_nothing(tmp_path: Path) -> None:
    save(quantize(mixtral(), "w4"), tmp_path / "four")
    model, before = mixtral(8), mixtral(8)(IDS).logits
    with pytest.raises(CheckpointError, match=r"experts.down_proj.*shape"):
        load_into(model, tmp_path / "four")
    assert type(model.model.layers[0].mlp.experts) is MixtralExperts and torch.equal(model(IDS).logits, before)
