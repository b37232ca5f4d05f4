"""Coverage cannot lie: calls are counted, and what no rule reached is an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qatlas.core.error import RuleError
from qatlas.core.scheme import scheme, weight
from qatlas.model.coverage import Coverage, Row, describe
from qatlas.model.pack import pack
from qatlas.model.quantized import quantizers
from qatlas.model.rules import Rule, keep_full, quantize


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "resnet"])
def test_every_quantizer_of_a_model_runs_in_both_modes(tiny, name):
    model = quantize(tiny.models[name](), "w4a8")
    cover = describe(model, tiny.batch(name)).check()
    assert {row.calls for row in cover.rows if row.weight != "full"} == {(1, 1)}
    assert not cover.silent and not cover.unreached
    assert len(quantizers(model)) == 2 * sum(row.weight != "full" for row in cover.rows)


def test_the_model_is_left_as_it_was(tiny):
    model = quantize(tiny.models["resnet"](), "w4a8").train()
    before, random = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    describe(model, tiny.batch("resnet"))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.training and torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


def test_rows_say_names_roles_shapes_and_numbers(tiny):
    cover = describe(quantize(tiny.models["llama"](tie=False), "w4a8"), tiny.batch("llama"))
    rows = {row.name: row for row in cover.rows}
    q, head, table = rows["model.layers.0.self_attn.q_proj"], rows["lm_head"], rows["model.embed_tokens"]
    assert (q.layer, q.role, q.shape, q.weight, q.input, q.bits) == ("QLinear", "@linear", (64, 64), "Uniform 4b", "Uniform 8b", 4.0)
    assert (head.role, head.weight, head.bits, table.role) == ("@head @linear", "full", 32.0, "@embedding")


def test_mean_bits_are_weighed_by_size():
    rows = [Row("a", "QLinear", "", (10, 30), "", "", 4.0), Row("b", "Linear", "", (10, 10), "", "", 32.0)]
    assert Coverage(rows).bits == pytest.approx((300 * 4 + 100 * 32) / 400)
    assert Coverage().bits == 0
    assert Coverage(rows).table()[0]["shape"] == [10, 30]


@pytest.mark.parametrize("tie, tied", [(True, "model.embed_tokens"), (False, "")])
def test_a_weight_of_two_layers_counts_once(tiny, tie, tied):
    model = quantize(tiny.models["llama"](tie=tie), [*keep_full("*embed_tokens", "lm_head"), Rule("*", weight=weight(4))])
    cover, matrices = describe(model), {id(p): p for p in model.parameters() if p.dim() == 2 and p.shape[1] > 1}
    full = {id(model.lm_head.weight), id(model.model.embed_tokens.weight)}
    sizes = {key: p.numel() for key, p in matrices.items()}
    assert {row.name: row.tied for row in cover.rows}["lm_head"] == tied
    assert cover.bits == pytest.approx(sum((32 if key in full else 4) * n for key, n in sizes.items()) / sum(sizes.values()))
    assert describe(pack(model)).bits == pytest.approx(cover.bits)


def test_a_quantizer_that_never_runs_is_an_error():
    """nn.TransformerEncoderLayer in eval mode goes round its submodules."""
    model = quantize(nn.TransformerEncoderLayer(64, 2, 64, dropout=0.0, batch_first=True), [*keep_full("self_attn*"), *rules()])
    cover = describe(model, torch.zeros(1, 3, 64))
    if cover.silent:
        with pytest.raises(RuleError, match="never ran"):
            cover.check()

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.used(x)

    cover = describe(quantize(Idle(), rules()), torch.zeros(1, 64))
    assert cover.silent == ["idle.weight_quantizer"]
    with pytest.raises(RuleError, match=r"never ran.*idle\.weight_quantizer"):
        cover.check()


def test_a_matrix_that_no_rule_reaches_is_an_error_unless_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(64, 64), nn.ParameterDict({"up": nn.Parameter(torch.randn(2, 64, 64))})

        def forward(self, x):
            return self.gate(x) @ self.experts["up"][0]

    x = torch.zeros(1, 64)
    with pytest.raises(RuleError, match=r"reached by no rule.*experts\.up.*keep_full"):
        describe(quantize(Experts(), rules()), x).check()
    describe(quantize(Experts(), [*keep_full("experts*"), *rules()]), x).check()


def test_without_a_batch_nothing_is_counted_and_packed_models_are_told_too(tiny):
    model = quantize(tiny.models["llama"](), "w4a8")
    before = describe(model)
    assert not before.silent and {row.calls for row in before.rows} == {(0, 0)}
    after = describe(pack(model), tiny.batch("llama"))
    packed = [row for row in after.rows if row.layer == "PackedLinear"]
    assert len(packed) == 14 and {row.bits for row in packed} == {4.0} and not after.silent
    assert after.bits == pytest.approx(before.bits)


def test_signals_inside_attention_are_rows_for_records(tiny):
    model = quantize(tiny.models["llama"](), [Rule("@attention:key", signal=scheme("w4a8").input), *keep_full("*")])
    rows = describe(model, tiny.batch("llama")).inside()
    assert [row["address"] for row in rows] == [f"model.layers.{i}.self_attn:key" for i in range(2)]
    assert {(row["quant"], tuple(row["calls"])) for row in rows} == {("Uniform 8b", (1, 1))}


def rules():
    from qatlas.core.scheme import weight
    from qatlas.model.rules import Rule

    return [Rule("*", weight=weight(4))]


def test_an_embedding_of_which_nobody_spoke_is_unreached(tiny):
    """Only bare tables of positions, which no rule can name as a layer, go without saying."""
    rule = Rule("*_proj", weight=weight(4))
    assert describe(quantize(tiny.models["llama"](tie=False), [rule])).unreached == ["model.embed_tokens.weight", "lm_head.weight"]
