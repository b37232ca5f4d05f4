"""BitNet checkpoints: bytes by hand, the trained weights bit for bit through transformers, its logits near; and nothing in a file is believed."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import llama

from qatlas import export
from qatlas.core.error import FormatError
from qatlas.core.grain import Group, PerChannel, PerTensor
from qatlas.core.grid import Sign, Stretched, Ternary, Uniform
from qatlas.core.qtensor import QTensor, Stacked
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, AbsMean, Learned, MinMax
from qatlas.core.scheme import scheme, weight
from qatlas.export import Checkpoint
from qatlas.export import bitnet as form
from qatlas.export.bitnet.fitting import INPUT, step
from qatlas.export.bitnet.layout import codes, load, stripes
from qatlas.model.pack import checkpoint, load_packed, pack, save
from qatlas.model.proof import TIES
from qatlas.model.roles import Role
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.model.verify import verify
from qatlas.papers.bitnet import of_input, of_weight

A8 = scheme("w4a8").input
SIZES = {"hidden_size": 64, "intermediate_size": 128}
IDS = torch.arange(40).reshape(2, 20)
Q = "model.layers.0.self_attn.q_proj"
KINDS = ("bitlinear", "autobitlinear")


def packed(kind, *rules, model=None):
    rules = [*rules, *keep_full(Role.EMBEDDING, Role.HEAD)]
    return pack(quantize(model or llama(**SIZES), rules, SimpleNamespace(extra_rules=(), target=f"bitnet:{kind}")))


def said(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def differ(found, tensors):
    def values(t):
        return t.dequantize() if isinstance(t, QTensor) else t.float()

    return [name for name, t in tensors.items() if not torch.equal(values(found[name]), values(t))]


def hold_the_same(path, made):
    found = form.qtensors(path)
    assert set(found) == set(form.read(path)) == set(made.tensors)
    assert differ(found, made.tensors) == differ(form.read(path), made.tensors) == []
    assert {n for n, t in found.items() if isinstance(t, QTensor)} == {n for n, t in made.tensors.items() if isinstance(t, QTensor)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    model = packed("bitlinear", Rule("*proj", weight=of_weight(1.58), input=A8))
    return form.write(checkpoint(model), tmp_path_factory.mktemp("written") / "out", "bitlinear")


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


# ---- packing ---------------------------------------------------------------------------------------------------------------------------------------

def test_bytes_by_hand():
    """Eight rows, two inputs: stripes of two rows. Byte [0, 0] holds rows 0, 2, 4, 6: 1 | 0 << 2 | 2 << 4 | 1 << 6 = 97, and so on."""
    t = torch.tensor([[0, 1], [-1, -1], [-1, 0], [1, 1], [1, -1], [0, 0], [0, 1], [1, -1]])
    want = torch.tensor([[1 + 0 * 4 + 2 * 16 + 1 * 64, 2 + 1 * 4 + 0 * 16 + 2 * 64], [0 + 2 * 4 + 1 * 16 + 2 * 64, 0 + 2 * 4 + 1 * 16 + 0 * 64]])
    assert want.tolist() == [[97, 134], [152, 24]] and torch.equal(stripes(t), want.to(torch.uint8))
    assert torch.equal(codes(stripes(t)).to(torch.int8) - 1, t.to(torch.int8))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31))
def test_bytes_are_those_of_transformers(quarter, cols, seed):
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    t = torch.randint(-1, 2, (4 * quarter, cols), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(stripes(t), pack_weights(t.clone()))
        assert torch.equal(unpack_weights(stripes(t), torch.int8), t)
    assert torch.equal(codes(stripes(t)).to(torch.int8) - 1, t)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([Ternary(), Ternary(0.7), Sign(), Uniform(2, narrow=True), Uniform(1), Stretched(3), Stretched(2)]),
       st.sampled_from([AbsMax(), AbsMean(), AbsMean(dtype="float16"), Learned(AbsMean())]), st.sampled_from(KINDS), st.booleans(),
       st.integers(0, 2**31))
def test_a_layer_is_what_its_tensors_say(grid, scale, kind, refit, seed):
    """Over grids and scales: what is held comes back bit for bit. autobitlinear holds all; bitlinear what `fit` has moved, and others by luck."""
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))
    quant = Quant(grid, PerTensor(), scale, refit=refit)
    try:
        tensor = form.fit(quant, kind, (8, 12)).quantize(x)
    except FormatError as refusal:
        assert kind == "bitlinear" and grid == Stretched(3) and "take Ternary()" in str(refusal)
        tensor = quant.quantize(x)
        if form.why_not(tensor, kind) is not None:
            assert "the inverse of no fp32 number" in str(form.why_not(tensor, kind))
            return
    assert form.why_not(tensor, kind) is None
    s, divides = step(tensor), kind == "bitlinear"
    t = stripes((tensor.values() / tensor.grid.values().abs().max()).round())
    assert torch.equal(load("w", t, 1 / s if divides else s, divides).dequantize(), tensor.dequantize())


def test_a_step_that_is_an_inverse_stays_what_it_is():
    """1 / (1 / s) moves one number in six, by its last bit, and what it gives it does not move again: for every mantissa of 16 bits, and more."""
    s = torch.cat([torch.arange(2**16) / 2**16 + 1, torch.rand(2**16, generator=torch.Generator().manual_seed(0)) + 1])
    cast = AbsMean(inverse=True).cast
    moved = cast(s) != s
    assert 0.1 < moved.float().mean() < 0.25 and torch.equal(cast(cast(s)), cast(s)) and float(((cast(s) - s) / s).abs().max()) < 2**-22
    assert torch.equal(cast(s * 2.0**-9), cast(s) * 2.0**-9)


# ---- what is written is what was trained -----------------------------------------------------------------------------------------------------------

CASES = {"BitNet": Quant(Ternary(), PerTensor(), AbsMean(floor=1e-5)), "learned": Quant(Ternary(), PerTensor(), Learned(AbsMean())),
         "signs": weight(1, PerTensor()), "three of four": Quant(Uniform(2, narrow=True), PerTensor(), AbsMax(dtype="float16"))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_the_trained_numbers(case, kind, tmp_path):
    model = packed(kind, Rule("*proj", weight=CASES[case], input=of_input()))
    path = form.write(checkpoint(model), tmp_path / "out", kind)
    hold_the_same(path, checkpoint(model))
    assert form.types(path) == {"ternary": 14, "full": 7} and form.holds(path) and "ties" in form.near(path)
    theirs = form.model(path)
    assert type(theirs.model.layers[0].mlp.up_proj).__name__.lower() == kind
    ours = model(IDS).logits
    assert (theirs(IDS).logits - ours).abs().max() < TIES * ours.abs().max()
    assert said(path)["modules_to_not_convert"] == ["lm_head"] and said(path)["linear_class"] == kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_of_each_class_means_what_it_means_there(kind, tmp_path):
    """The other class on the same file gives another model: the convention is tested, not only kept."""
    model = packed(kind, Rule("*proj", weight=of_weight(1.58), input=A8))
    path = form.write(checkpoint(model), tmp_path / "out", kind)
    config = path / "config.json"
    config.write_text(config.read_text().replace(f'"{kind}"', f'"{KINDS[1 - KINDS.index(kind)]}"'))
    assert len(differ(form.qtensors(path), checkpoint(model).tensors)) == len(differ(form.read(path), checkpoint(model).tensors)) == 14
    assert (form.model(path)(IDS).logits - model(IDS).logits).abs().max() > TIES * model(IDS).logits.abs().max()


def test_layers_in_full_precision_stay_so_whatever_they_are_called(tmp_path):
    """transformers takes names as prefixes, suffixes and patterns."""
    from qatlas.export.bitnet.directory import _left

    assert _left(["fc1", "a.fc2"], {"a.fc2"}) == ["fc1"] and _left(["fc", "inner.fc"], {"inner.fc"}) == ["^fc$"]
    model = packed("bitlinear", Rule("*.0.*proj", weight=of_weight(1.58), input=A8))
    path = form.write(checkpoint(model), tmp_path / "out", "bitlinear")
    assert form.types(path) == {"ternary": 7, "full": 14} and len(said(path)["modules_to_not_convert"]) == 8
    theirs = form.model(path)
    assert type(theirs.model.layers[1].mlp.up_proj).__name__ == "Linear" and type(theirs.model.layers[0].mlp.up_proj).__name__ == "BitLinear"
    assert (theirs(IDS).logits - model(IDS).logits).abs().max() < TIES * model(IDS).logits.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_norms_of_its_own(kind, tmp_path):
    """BitNetForCausalLM (2B4T): attn_sub_norm and ffn_sub_norm are parameters as any other, a squared ReLU is the model's."""
    from transformers import BitNetConfig, BitNetForCausalLM

    torch.manual_seed(0)
    model = BitNetForCausalLM(BitNetConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
                                           num_key_value_heads=2, bos_token_id=0, eos_token_id=0)).eval()
    model = packed(kind, Rule("*proj", weight=of_weight(1.58), input=A8), model=model)
    path = form.write(checkpoint(model), tmp_path / "out", kind)
    hold_the_same(path, checkpoint(model))
    assert "model.layers.0.self_attn.attn_sub_norm.weight" in form.qtensors(path)
    ours = model(IDS).logits
    assert (form.model(path)(IDS).logits - ours).abs().max() < TIES * ours.abs().max()


def test_biases(tmp_path):
    model = packed("bitlinear", Rule("*proj", weight=of_weight(1.58), input=A8), model=llama(**SIZES, attention_bias=True))
    path = form.write(checkpoint(model), tmp_path / "out", "bitlinear")
    hold_the_same(path, checkpoint(model))
    assert (form.model(path)(IDS).logits - model(IDS).logits).abs().max() < TIES * model(IDS).logits.abs().max()


# ---- refusals --------------------------------------------------------------------------------------------------------------------------------------

HELD_NOT = [
    (weight(1.58), (8, 64), "gives a matrix 8 steps"), (Quant(Ternary(), Group(32)), (8, 64), "16 steps"),
    (Quant(Uniform(2), PerTensor()), (8, 64), "other values"), (weight(4, PerTensor()), (8, 64), "other values"),
    (Quant(Ternary(), PerTensor()), (6, 64), "6 rows are no multiple of 4"), (Quant(Ternary(), PerTensor()), (8, 8, 3), "only matrices"),
    (Quant(Uniform(2, narrow=True), PerTensor(), MinMax()), (8, 64), "a zero or an offset"),
    (Quant(Ternary(), PerTensor(), AbsMax(nested=Quant(Uniform(6, False), PerTensor(), AbsMax()))), (8, 64), "itself quantized"),
    (Quant(Uniform(2, None), PerTensor()), (8, 64), "other values"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quant, shape, says", HELD_NOT)
def test_what_cannot_be_held_is_refused_with_the_nearest(kind, quant, shape, says):
    with pytest.raises(FormatError, match=says) as caught:
        form.fit(quant, kind, shape)
    assert f"bitnet:{kind}" in str(caught.value) and "w1.58a8-tensor" in str(caught.value) and "gguf:tq2_0" in str(caught.value)


def test_values_of_a_tensor_decide():
    x, quant = torch.randn(8, 16), Quant(Ternary(), PerTensor(), AbsMean())
    assert "several parts" in str(form.why_not(Stacked([quant.quantize(x)]), "bitlinear"))
    assert "several steps" in str(form.why_not(quant.but(grain=PerChannel()).quantize(x), "autobitlinear"))
    bad, odd = quant.quantize(x), quant.quantize(x)
    bad.scale[:], odd.scale[:] = torch.inf, 1.9999998807907104    # 2 - 2^-23: its inverse is that of 2, rounded
    assert form.why_not(odd, "autobitlinear") is None and "the inverse of no fp32 number" in str(form.why_not(odd, "bitlinear"))
    assert "finite fp32" in str(form.why_not(bad, "autobitlinear"))
    moved = QTensor(odd.codes, odd.scale, torch.ones(1), None, odd.grid, odd.grain)
    assert "zero point" in str(form.why_not(moved, "autobitlinear"))
    assert "inverse=True" in str(form.why_not(quant, "bitlinear", (8, 16)))
    with pytest.raises(FormatError, match="nearest: bitnet:bitlinear"):
        form.fit(quant, "online", (8, 16))


def test_inputs_are_never_in_full_precision():
    own = of_weight(1.58)
    assert form.fit_input(A8, "autobitlinear", own, (8, 64), "Linear") == INPUT.but(estimator=A8.estimator)
    for quant, entry, module, says in ((own, None, "Linear", "its input is in full precision"), (own, A8.but(grid=Uniform(4)), "Linear", "bits=4"),
                                       (own, scheme("w8a8-static").input, "Linear", "quantizes every input"),
                                       (own, A8, "Conv1D", "this layer is a Conv1D"), (None, A8, "Linear", "quantize both")):
        with pytest.raises(FormatError, match=says):
            form.fit_input(entry, "autobitlinear", quant, (8, 64), module)


def test_norms_in_front_are_refused(tmp_path):
    from qatlas.layers.norm import Norm

    rules = [Rule("*o_proj", weight=of_weight(1.58), input=A8, norm=Norm()), Rule("*proj", weight=of_weight(1.58), input=A8)]
    with pytest.raises(FormatError, match="no place for the norm"):
        packed("bitlinear", *rules)


def test_a_refusal_leaves_nothing_behind(tmp_path):
    model = packed("autobitlinear", Rule("*proj", weight=of_weight(1.58), input=A8))
    made = checkpoint(model)
    for tensors, inputs, says in ((made.tensors, {}, "its input is in full precision"),
                                  ({n: t.dequantize() if isinstance(t, QTensor) else t for n, t in made.tensors.items()}, {}, "no layer"),
                                  (made.tensors | {f"{Q}.weight": weight(4).quantize(torch.randn(64, 64))}, made.inputs, "q_proj.weight, shape"),
                                  (made.tensors | {f"{Q}.weight": Stacked([made.tensors[f"{Q}.weight"]] * 2)}, made.inputs, "several parts")):
        with pytest.raises(FormatError, match=says):
            form.write(Checkpoint(made.config, tensors, inputs=inputs), tmp_path / "out", "autobitlinear")
    assert not list(tmp_path.iterdir())


# ---- reading what nobody should believe ------------------------------------------------------------------------------------------------------------

def tensor(name, make):
    def change(tensors):
        made = make(tensors.pop(f"{Q}.{name}"))
        tensors |= {} if made is None else {f"{Q}.{name}": made.contiguous()}
    return change


DAMAGE = {
    "no scale": (tensor("weight_scale", lambda t: None), "no .*weight_scale"), "no weight": (tensor("weight", lambda t: None), "weight is missing"),
    "scales": (tensor("weight_scale", lambda t: t.repeat(2)), "one floating number"),
    "scale of bytes": (tensor("weight_scale", lambda t: t.to(torch.uint8)), "one floating number"),
    "zero": (tensor("weight_scale", lambda t: t * 0), "a step of inf"), "NaN": (tensor("weight_scale", lambda t: t * torch.nan), "a step of nan"),
    "flat": (tensor("weight", lambda t: t.flatten()), "it is a matrix"), "empty": (tensor("weight", lambda t: t[:0]), "it is a matrix"),
    "floats": (tensor("weight", lambda t: t.float()), "it is uint8"), "threes": (tensor("weight", lambda t: t | 192), "a byte holds 3"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_said_so(case, copied):
    from safetensors.torch import load_file, save_file

    change, says = DAMAGE[case]
    tensors = {name: t.clone() for name, t in load_file(copied / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    for reader in (form.qtensors, form.read, form.model):
        with pytest.raises(FormatError, match=says):
            reader(copied)


@pytest.mark.parametrize("change, says", [
    ({"linear_class": "linear"}, "linear_class 'linear'"), ({"linear_class": []}, "linear_class"), ({"use_rms_norm": True}, "a norm stands inside"),
    ({"linear_class": "autobitlinear", "quantization_mode": "online"}, "latent weights"), ({"quant_method": "gptq"}, "by 'gptq'")])
def test_a_config_of_another_kind_is_said_so(change, says, copied):
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] |= change
    (copied / "config.json").write_text(json.dumps(config))
    for reader in (form.qtensors, form.read, form.model):
        with pytest.raises(FormatError, match=says):
            reader(copied)


def test_a_config_that_transformers_refuses_and_truncated_files(copied):
    text, whole = (copied / "config.json").read_text(), (copied / "model.safetensors").read_bytes()
    for old, new, says in (('"LlamaForCausalLM"', '"pipeline"', "no model class"), ('"hidden_size": 64', '"hidden_size": 32', "cannot load"),
                           ('"hidden_size": 64', '"hidden_size": "x"', "cannot load")):
        (copied / "config.json").write_text(text.replace(old, new))
        with pytest.raises(FormatError, match=says):
            form.model(copied)
    (copied / "config.json").write_text(text)
    for length in (0, 7, 200, len(whole) // 2, len(whole) - 1):
        (copied / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(FormatError, match="no whole safetensors file"):
            form.qtensors(copied)
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(FormatError, match="pickle files are never opened"):
        form.qtensors(copied)


def test_autobitlinear_takes_weights_that_are_not_packed():
    """As transformers does: -1, 0, 1 in the model's type, a row a row."""
    t = torch.randint(-1, 2, (3, 5)).to(torch.bfloat16)
    assert torch.equal(load("w", t, torch.tensor([0.5]), False).dequantize(), t.float() * 0.5)
    for weight_, divides in ((t * 2, False), (t, True)):
        with pytest.raises(FormatError, match="it is uint8"):
            load("w", weight_, torch.tensor([0.5]), divides)


# ---- proofs ----------------------------------------------------------------------------------------------------------------------------------------

def test_proofs_pass_and_a_flipped_bit_fails_them(tmp_path):
    model = packed("bitlinear", Rule("*proj", weight=of_weight(1.58), input=A8))
    save(model, tmp_path / "out")
    path = form.write(checkpoint(model), export.place(tmp_path / "out/exports", "bitnet:bitlinear"), "bitlinear")
    proofs = verify(tmp_path / "out", trained=load_packed(tmp_path / "out"))
    assert [proof.passed for proof in proofs] == [True] * 4, proofs
    assert "14 ternary" in proofs[2].result and "127 / max|x|" in proofs[3].tolerance
    file = path / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert [proof.passed for proof in verify(tmp_path / "out")] == [True, False]
