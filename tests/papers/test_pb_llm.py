"""PB-LLM: the exact checks of its sheet, and what the paper's function promises on a Llama of two layers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import WORDS
from tiny import Stop, letters
from tiny import llama as tiny_llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from qatlas import export
from qatlas.core.compensate import Hessian, compensate, factor
from qatlas.core.error import FormatError, QatlasError, QuantError
from qatlas.core.grain import Group, PerTensor
from qatlas.core.partial import Partial
from qatlas.core.scale import MinMax
from qatlas.layers.packed import MaskedStore, Packed
from qatlas.model.coverage import describe
from qatlas.model.exportable import holders
from qatlas.model.further import unpack
from qatlas.model.pack import checkpoint, load_packed, pack, save
from qatlas.model.quantized import quantized
from qatlas.model.rules import Rule
from qatlas.papers.pb_llm import pb_llm, rounded
from qatlas.train import data, fit
from qatlas.train.run import Run
from qatlas.train.task import LanguageModelling

IDS = torch.arange(24).view(2, 12) % 32
few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)
shares = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0])


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lm(**more):
    run = more.pop("run", None) or Run(progress=False)
    return LanguageModelling(data.Text(WORDS * 20, WORDS * 4), letters, length=16, batch=4, run=run, **more)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2))


def run(task=None, model=None, **arguments):
    return pb_llm(model or llama(), task or lm(), **{"steps": 3, "batches": 3, "lr": 1e-3, **arguments})


# ---- without training ------------------------------------------------------------------------------------------------------------------------------

def felt(seed, width=24):
    x, h = draw(seed, 60, width) @ draw(seed + 1, width, width), Hessian(width)
    h.add(x)
    return draw(seed + 2, 8, width), h.value, factor(h.value)


@few
@given(seeds, st.sampled_from([None, 8]), st.booleans())
def test_codes_are_those_of_the_compensated_weight(seed, group, centred):
    w, h, u = felt(seed)
    q, turned = rounded(w, Partial(salient=0.1), u, metric="hessian", group=group, centred=centred)
    plain, same = rounded(w, Partial(salient=0.1), u, metric="hessian", group=group, centred=centred, compensated=False)
    assert torch.equal(same, w) and torch.equal(q.mask, plain.mask) and (q.other.offset is not None) == centred
    def cost(part):
        e = (w - part.dequantize()).double()
        return float((e @ h * e).sum())
    assert cost(q) < 1.5 * cost(plain), "column by column is greedy: nearly always less, and never much more"
    errors = (turned - q.dequantize()).double() / u.diagonal()
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
    e = (w - q.dequantize()).double()
    torch.testing.assert_close(errors.square().sum(), (e @ damped * e).sum(), rtol=1e-3, atol=1e-6)


def test_all_salient_is_gptq_in_8_bits():
    w, _, u = felt(0)
    q, _ = rounded(w, Partial(salient=1.0), u)
    quant = Partial().high
    place = quant.measure(quant.grain.view(w))
    turned = compensate(w, u, lambda j, c: place.s[:, 0] * (quant.grid.snap(c / place.s[:, 0] + place.zero[:, 0]) - place.zero[:, 0]))
    torch.testing.assert_close(q.dequantize(), place.s * (quant.grid.snap(turned / place.s + place.zero) - place.zero))


def test_groups_masks_and_centres():
    w, _, u = felt(3)
    q, _ = rounded(w, Partial(salient=0.25), u, metric="hessian", group=8)
    assert q.other.grain == Group(8) and q.other.steps.shape == (8, 3) and [int(m.sum()) for m in q.mask.split(8, 1)] == [15, 15, 15]
    ours, _ = rounded(w, Partial(salient=0.25))
    theirs, _ = rounded(w, Partial(salient=0.25), zeros=True)
    rest = ~ours.mask
    torch.testing.assert_close(ours.other.offset, (w * rest).sum(1) / rest.sum(1))
    torch.testing.assert_close(theirs.other.offset, (w * rest).mean(1))
    assert (ours.dequantize() - w).square().sum() < (theirs.dequantize() - w).square().sum()
    with pytest.raises(QuantError, match="group=7"):
        rounded(w, Partial(), group=7)


@pytest.mark.parametrize("arguments", [{}, {"metric": "magnitude"}, {"metric": "tails", "compensate": False}, {"group": 16}, {"published": True},
                                       {"centred": False, "compensate": False, "metric": "magnitude"}])
def test_without_training_everything_is_packed(arguments, tmp_path):
    model = run(steps=0, **arguments)
    layers = [m for m in model.modules() if isinstance(m, Packed)]
    assert len(layers) == 14 and not quantized(model) and type(model.lm_head) is nn.Linear
    assert all(isinstance(layer.store, MaskedStore) for layer in layers)
    save(model, tmp_path / "saved")
    assert torch.equal(load_packed(tmp_path / "saved")(IDS).logits, model(IDS).logits)


def test_conv1d_of_gpt2_is_a_linear(tmp_path):
    torch.manual_seed(0)
    model = run(model=GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=32, n_positions=32)), steps=0)
    save(model, tmp_path / "saved")
    assert torch.equal(load_packed(tmp_path / "saved")(IDS).logits, model(IDS).logits)
    assert len([m for m in model.modules() if isinstance(m, Packed)]) == 8


# ---- with training ---------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments", [{}, {"metric": "magnitude"}, {"metric": "tails"}, {"compensate": True}, {"published": True}, {"salient": 0.0}])
def test_training_moves_signs_alone(arguments):
    masks, start = {}, llama().state_dict()
    task = lm()

    class Look(fit.Tactic):
        def start(self, loop):
            masks.update({name: (layer.weight_quantizer.mask.clone(), layer.hard()) for name, layer in quantized(loop.model).items()})

    task.run.tactics = (Look(),)
    model = run(task, **arguments, lr=1e-2)
    for name, layer in quantized(model).items():
        mask, before = masks[name]
        assert torch.equal(layer.weight_quantizer.mask, mask) and torch.equal(layer.hard()[mask], before[mask])
        assert (layer.hard()[~mask] != before[~mask]).any()
        assert layer.weight_quantizer.quant.grain == (PerTensor() if arguments.get("published") else Partial().grain)
    still = [name for name, p in model.state_dict().items() if name in start and "proj" not in name]
    assert still and all(torch.equal(model.state_dict()[name], start[name]) for name in still)


def test_more_salient_weights_are_nearer_to_full_precision():
    full = llama()(IDS).logits
    off = [float((run(steps=0, salient=share)(IDS).logits - full).square().mean()) for share in (0.0, 0.2, 0.6, 1.0)]
    assert off == sorted(off, reverse=True)


def test_it_packs_saves_and_loads_and_counts_its_bits(tmp_path):
    model = run(salient=0.1)
    logits = model(IDS).logits
    masters = next(row.bits for row in describe(model).rows if row.name.endswith("up_proj"))
    save(model, tmp_path / "saved")
    loaded = load_packed(tmp_path / "saved")
    assert torch.equal(loaded(IDS).logits, logits) and torch.equal(pack(model)(IDS).logits, logits)
    store = loaded.model.layers[0].mlp.up_proj.store
    assert store.bits == pytest.approx(2.7, abs=0.1) and masters == pytest.approx(2.7)
    q = store.qtensor()
    assert q.nbytes() == sum(t.numel() * t.element_size() for t in store.state_dict().values())
    with pytest.raises(QuantError, match="made of several parts"):
        unpack(loaded)


def test_it_resumes_to_the_same_bits(tmp_path):
    def one(out, stop=None, resume=False):
        task = lm(run=Run(out, save_every=1, resume=resume, progress=False))
        task.run.tactics = (Stop(stop),)
        return run(task, steps=4)

    whole = one(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path / "halted", stop=2)
    again = one(tmp_path / "halted", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


# ---- what is refused -------------------------------------------------------------------------------------------------------------------------------

def test_every_target_refuses_it_with_the_reason(tmp_path):
    model = run(steps=0)
    made = checkpoint(model)
    for name in export.targets():
        form, kind = export.target(name)
        if hasattr(form, "OPSETS") or name == "gguf:f32":
            continue                                              # ONNX: the graph is traced before the writer is asked
        with pytest.raises(FormatError, match=r"model\.") as refusal:
            form.write(made, tmp_path / "model", kind)
        plain = name in ("gguf:q4_0", "gptq:w4", "awq:w4", "compressed-tensors:w4a16", "torchao:w4a16")
        assert "made of several parts" in str(refusal.value) or not plain
    assert not list(tmp_path.iterdir()) and not holders(model)
    form, kind = export.target("gguf:f32")                        # plain values
    found = form.read(form.write(made, tmp_path / "model.gguf", kind))
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.hard())
    for name in ("gguf:f32", "gguf:q8_0", "gptq:w4", "compressed-tensors:w8a16", "onnx:int8", "bitnet:i2_s"):
        if name in export.targets():
            with pytest.raises(FormatError, match=r"q_proj.*salient weights in 8 bits stand among signs"):
                run(lm(target=name))


def test_a_users_rule_stands_before_the_papers():
    task = lm(extra_rules=(Rule("*.down_proj", weight=None), Rule("*.o_proj", weight=Partial().high.but(scale=MinMax()))))
    model = run(task, steps=0)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert not isinstance(model.model.layers[1].self_attn.o_proj.store, MaskedStore)


@pytest.mark.parametrize("wrong", [{"salient": 1.5}, {"salient": -0.1}, {"metric": "size"}, {"group": 16}, {"centred": True}, {"batches": 0},
                                   {"group": 7, "steps": 0}, {"steps": -1}])
def test_arguments_that_cannot_work(wrong):
    with pytest.raises(QatlasError):
        run(**wrong)
    assert tiny_llama() is not None
