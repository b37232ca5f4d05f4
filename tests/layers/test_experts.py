"""Experts as stacks of matrices: the module's own numbers, each expert quantized by itself, and what is no such module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qatlas.core.error import QuantError
from qatlas.core.grain import Block, Group, PerChannel, PerTensor
from qatlas.core.quantizer import Quant
from qatlas.core.scheme import scheme, weight
from qatlas.core.transform import Hadamard
from qatlas.layers.adapter import Lora
from qatlas.layers.experts import Experts, QStack, Stack, stacked, why_not
from qatlas.layers.quantized import KEEP, Slots

E, H, INNER, T = 4, 16, 24, 10
SIZE = {"hidden_size": H, "intermediate_size": INNER, "moe_intermediate_size": INNER, "num_local_experts": E, "num_experts": E}


def theirs(kind: str = "mixtral", dtype: torch.dtype = torch.float32) -> Any:
    made = {"mixtral": lambda: MixtralExperts(MixtralConfig(**SIZE)), "qwen3": lambda: Qwen3MoeExperts(Qwen3MoeConfig(**SIZE)),
            "gpt_oss": lambda: GptOssExperts(GptOssConfig(**SIZE))}[kind]()
    torch.manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made.to(dtype)


def tokens(seed: int = 0, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    index = torch.rand(T, E, generator=draw).argsort(-1)[:, :k]
    return torch.randn(T, H, generator=draw), index, torch.rand(T, k, generator=draw)


def quantized(slots: Slots, kind: str = "mixtral") -> Any:
    opened = Experts(theirs(kind))
    for name in ("gate_up_proj", "down_proj"):
        setattr(opened, name, QStack.of(getattr(opened, name), slots))
    return opened


@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_opened_experts_compute_what_the_module_computes(kind: str, k: int) -> None:
    own = theirs(kind)
    assert stacked(own) and why_not(own) is None
    opened = Experts(own)
    x, index, weights = tokens(k=k)
    assert torch.equal(opened(x, index, weights), own(x, index, weights))
    index[0], index[3, 0] = E, E                                  # an index beyond the last expert is none
    assert torch.equal(opened(x, index, weights), own(x, index, weights)) and (k > 1 or not opened(x, index, weights)[0].any())
    assert opened(x[:0], index[:0], weights[:0]).shape == (0, H)


def test_they_share_memory_and_half_precision_stays() -> None:
    own = theirs(dtype=torch.bfloat16)
    opened = Experts(own)
    assert opened.gate_up_proj.weight.data_ptr() == own.gate_up_proj.data_ptr() and opened.gate_up_proj.weight.shape == (E * 2 * INNER, H)
    assert why_not(own) is None and opened(tokens()[0].bfloat16(), *tokens()[1:]).dtype == torch.bfloat16


@pytest.mark.parametrize("grain", [PerChannel(), PerTensor(), Group(8), Block(8, 8)], ids=str)
@pytest.mark.parametrize("bits", [1, 1.58, 2, 4])
def test_each_expert_is_quantized_by_itself(grain: Any, bits: float) -> None:
    quant = weight(bits, grain)
    opened = quantized(Slots(quant))
    for name, own in (("gate_up_proj", theirs().gate_up_proj), ("down_proj", theirs().down_proj)):
        layer = getattr(opened, name)
        for hard, one in zip(layer.hard().unflatten(0, (E, -1)), own.detach(), strict=True):
            assert torch.equal(hard, quant.hard(one)), "as if its matrix stood alone"
        assert torch.equal(layer.quantize().dequantize(), layer.hard())
        assert layer.quantize().steps.numel() == E * torch.Size(quant.grain.scale_shape(own[0].shape)).numel()


def test_inputs_are_quantized_where_they_enter_each_product() -> None:
    a8 = scheme("w4a8").input
    assert a8 is not None
    opened, (x, index, weights) = quantized(Slots(weight(4), a8)), tokens()
    out = torch.zeros(T, H)
    up, down = (getattr(opened, name).hard().unflatten(0, (E, -1)) for name in ("gate_up_proj", "down_proj"))
    for pos in range(index.shape[1]):                             # token by token, by the formula
        for t in range(T):
            e = int(index[t, pos])
            gate, linear = (a8.hard(x[t]) @ up[e].T).chunk(2)
            out[t] += a8.hard(opened.act_fn(gate) * linear) @ down[e].T * weights[t, pos]
    assert (opened(x, index, weights) - out).abs().max() < 1e-3 * out.abs().max() + 1e-6 and out.abs().max() > 0.01


@pytest.mark.parametrize("bits", [1.58, 4])
def test_gradients_reach_the_experts_that_were_asked_however_weights_are_kept(bits: float) -> None:
    x, _, weights = tokens()
    index = torch.tensor([[0, 2]] * T)
    found = []
    for keep in KEEP:
        opened = quantized(Slots(weight(bits), keep=keep))
        (opened(x, index, weights).square().sum()).backward()
        found.append([p.grad for p in opened.parameters()])
        for name in ("gate_up_proj", "down_proj"):
            asked = getattr(opened, name).weight.grad.unflatten(0, (E, -1)).flatten(1).abs().sum(1) > 0
            assert asked.tolist() == [True, False, True, False]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("bits", [1, 1.58, 4])
def test_packed_they_compute_the_same(bits: float) -> None:
    opened, batch = quantized(Slots(weight(bits, PerTensor()), scheme("w4a8").input, transform=Hadamard())), tokens()
    packed = copy.deepcopy(opened)
    for name in ("gate_up_proj", "down_proj"):
        setattr(packed, name, getattr(opened, name).pack())
    assert torch.equal(packed(*batch), opened(*batch))


@pytest.mark.parametrize(("slots", "says"), [
    (Slots(weight(4, PerChannel(1))), r"PerChannel\(axis=1\) has scales that run over several experts of 48 x 16; take PerChannel\(\)"),
    (Slots(Quant(weight(4).grid, Block(9, 4))), "run over several experts"), (Slots(weight(4), adapter=Lora(2)), "shared by all experts")])
def test_what_would_run_over_experts_is_refused(slots: Slots, says: str) -> None:
    with pytest.raises(QuantError, match=says):
        quantized(slots)


def test_what_cannot_be_opened_says_why() -> None:
    assert "GptOssExperts holds more than two stacks" in (why_not(theirs("gpt_oss")) or "")
    turned, clamped, hooked = theirs(), theirs(), theirs()
    turned.down_proj = nn.Parameter(turned.down_proj.detach().transpose(1, 2))
    assert "not (E, 2 I, H) and (E, H, I)" in (why_not(turned) or "")

    class Clamped(MixtralExperts):
        """With an operation more."""

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return super().forward(hidden_states, top_k_index, top_k_weights).clamp(-0.01, 0.01)

    clamped.__class__ = Clamped
    assert "Clamped computes more than act(gate) up" in (why_not(clamped) or "")
    hooked.forward = lambda *args: None
    assert "forward of another form" in (why_not(hooked) or "")
    assert not stacked(nn.Linear(2, 2)) and "4 x (48, 16)" in repr(Stack(torch.zeros(E * 48, 16), E))
