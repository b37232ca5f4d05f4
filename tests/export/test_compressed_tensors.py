"""compressed-tensors: fake equals packed equals what the package's own decompression gives, and transformers computes what we compute."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import MATRICES, llama

from qatlas import export
from qatlas.core.error import FormatError
from qatlas.core.floats import Float
from qatlas.core.grain import Block, Group, PerChannel, PerTensor
from qatlas.core.grid import HalfStep, Sign, Stretched, Ternary, Uniform
from qatlas.core.qtensor import QTensor, Stacked
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, AbsMean, Learned, MinMax
from qatlas.core.scheme import scheme, weight
from qatlas.export import Checkpoint
from qatlas.export import compressed_tensors as form
from qatlas.export.compressed_tensors.fitting import integers, kind_of, sharing
from qatlas.export.compressed_tensors.kinds import FP8, INT8, KINDS, NESTED
from qatlas.export.compressed_tensors.layout import store
from qatlas.export.integers import words
from qatlas.model.pack import checkpoint, load_packed, pack, save
from qatlas.model.roles import Role
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.model.verify import verify

A8 = scheme("w4a8").input
U4 = Quant(Uniform(4, False), Group(32), MinMax())
SIZES = {"hidden_size": 64, "intermediate_size": 128}
there = pytest.mark.skipif(bool(form.lacks()), reason="needs compressed-tensors")


def packed(kind, *rules, head=None, **sizes):
    """A packed tiny Llama, trained for the target by nobody."""
    rules = [*rules, *keep_full(Role.EMBEDDING, *(() if head else (Role.HEAD,)))]
    return pack(quantize(llama(**{**SIZES, **sizes}), rules, SimpleNamespace(extra_rules=(), target=f"compressed-tensors:{kind}")))


def config(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def same(found, tensors):
    return [name for name, t in tensors.items() if not torch.equal(found[name], t.dequantize() if isinstance(t, QTensor) else t)]


# ---- what is written is what was trained -----------------------------------------------------------------------------------------------------------

CASES = {
    "w4a16 groups": ("w4a16", weight(4, Group(32)), None),
    "w4a16 channels": ("w4a16", weight(4), None),
    "w4a16 one step a tensor": ("w4a16", weight(4, PerTensor()), None),
    "w4a16 zeros": ("w4a16", U4, None),
    "w2a16 zeros": ("w2a16", Quant(Uniform(2, False), PerChannel(), MinMax()), None),
    "w3a16 zeros": ("w3a16", Quant(Uniform(3, False), Group(64), MinMax(dtype="float16")), None),
    "w4a16 not around zero": ("w4a16", Quant(Uniform(4, False), Group(32), AbsMax()), None),
    "w2a16 ternary": ("w2a16", weight(1.58), None),
    "w2a16 signs": ("w2a16", weight(1), None),
    "w3a16 half steps": ("w3a16", Quant(HalfStep(2), Group(16), AbsMean()), None),
    "w3a16": ("w3a16", weight(3), None),
    "w8a16": ("w8a16", weight(8, Group(64)), None),
    "w4a16 tiles": ("w4a16", Quant(Uniform(4), Block(16, 16), AbsMax(dtype="float16")), None),
    "w8a8": ("w8a8", weight(8), A8),
    "w4a8": ("w4a8", weight(4), A8),
    "w4a8 zeros": ("w4a8", U4, A8),
    "fp8a16": ("fp8a16", Quant(Float(4, 3), PerChannel(), AbsMax()), None),
    "fp8_dynamic": ("fp8_dynamic", Quant(Float(4, 3), PerChannel(), Learned(AbsMax())), FP8),
    "mxfp4a16": ("mxfp4a16", Quant(Float(2, 1), Group(32), AbsMax()), None),
    "nvfp4a16": ("nvfp4a16", Quant(Float(2, 1), Group(16), AbsMax()), None),
    "mixed, one kind": ("mixed", weight(4), A8),
}


@there
@pytest.mark.parametrize("case", CASES)
def test_the_package_and_transformers_read_the_trained_numbers(case, tmp_path):
    kind, quant, entry = CASES[case]
    model = packed(kind, Rule("*proj", weight=quant, input=entry))
    made = checkpoint(model)
    path = form.write(made, tmp_path / "out", kind)
    assert same(form.read(path), made.tensors) == [] and set(form.read(path)) == set(made.tensors)
    ids = torch.arange(40).reshape(2, 20)
    assert torch.equal(form.model(path)(ids).logits, model(ids).logits)
    said = config(path)
    assert said["ignore"] == ["lm_head"] and said["config_groups"]["group_0"]["targets"] == ["Linear"] and len(said["config_groups"]) == 1


@there
def test_mixed_precision_is_groups_by_name(tmp_path):
    rules = [Rule("*down_proj", weight=weight(8), input=A8), Rule("*o_proj", weight=None, input=None), Rule("*q_proj", weight=weight(2, Group(16))),
             Rule("*v_proj", weight=Quant(Float(4, 3)), input=FP8), Rule("*proj", weight=weight(4, Group(32)))]
    model = packed("mixed", *rules)
    path = form.write(checkpoint(model), tmp_path / "out", "mixed")
    said = config(path)
    found = {name: (group["format"], group["weights"]["num_bits"]) for group in said["config_groups"].values() for name in group["targets"]}
    assert said["format"] == "mixed-precision" and len(said["config_groups"]) == 4 and len(found) == 12
    assert found["model.layers.1.mlp.down_proj"] == ("int-quantized", 8) and found["model.layers.0.self_attn.q_proj"] == ("pack-quantized", 2)
    assert found["model.layers.0.self_attn.v_proj"] == ("float-quantized", 8) and found["model.layers.0.mlp.up_proj"] == ("pack-quantized", 4)
    assert sorted(said["ignore"]) == ["lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    assert same(form.read(path), checkpoint(model).tensors) == []
    ids = torch.arange(40).reshape(2, 20)
    assert torch.equal(form.model(path)(ids).logits, model(ids).logits)


@there
def test_groups_that_transformers_cannot_load_are_said_so(tmp_path):
    model = packed("mixed", Rule("*q_proj", weight=U4), Rule("*proj", weight=weight(4)))
    path = form.write(checkpoint(model), tmp_path / "out", "mixed")
    assert same(form.read(path), checkpoint(model).tensors) == [] and "first of the 2 config groups" in form.model(path)


@there
@pytest.mark.parametrize("tied", [True, False])
def test_heads(tied, tmp_path):
    model = packed("w4a16", Rule("*proj" if tied else "@head", weight=weight(4)), *([] if tied else [Rule("*proj", weight=weight(4))]), tied=tied,
                   head=not tied)
    path = form.write(checkpoint(model), tmp_path / "out", "w4a16")
    ids = torch.arange(40).reshape(2, 20)
    assert config(path)["ignore"] == (["lm_head"] if tied else []) and torch.equal(form.model(path)(ids).logits, model(ids).logits)


@there
def test_what_was_trained_for_no_target_is_written_with_its_fp32_steps(tmp_path):
    model = pack(quantize(llama(**SIZES), [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*proj", weight=weight(4, Group(32)))]))
    path = form.write(checkpoint(model), tmp_path / "out", "w4a16")
    assert same(form.read(path), checkpoint(model).tensors) == []


def test_types_in_the_file(tmp_path):
    from safetensors.torch import load_file

    model = packed("w4a16", Rule("*q_proj", weight=weight(4, Group(32))), Rule("*k_proj", weight=U4))
    model.model.norm.weight.data.fill_(1.5)
    found = load_file(form.write(checkpoint(model), tmp_path / "out", "w4a16") / "model.safetensors")
    at = "model.layers.0.self_attn."
    assert found[f"{at}q_proj.weight_packed"].dtype == torch.int32 and found[f"{at}q_proj.weight_packed"].shape == (64, 8)
    assert found[f"{at}q_proj.weight_scale"].dtype == torch.bfloat16 and found[f"{at}k_proj.weight_scale"].dtype == torch.float32
    assert found[f"{at}k_proj.weight_zero_point"].shape == (32 * 4 // 32, 2) and found[f"{at}q_proj.weight_shape"].tolist() == [64, 64]
    assert found["model.norm.weight"].dtype == torch.bfloat16 and found["lm_head.weight"].dtype == torch.float32


@pytest.mark.parametrize("entry", [A8, INT8])
def test_an_input_takes_the_reach_of_the_format(entry):
    assert form.fit_input(entry, "w8a8", weight(8), (8, 64), "Linear") == INT8.but(estimator=entry.estimator)


@there
def test_other_families(tmp_path):
    """Names, biases and heads of an encoder; sentences of one row, where a token's step is a row's."""
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128,
                                                     max_position_embeddings=64, num_labels=3)).eval()
    model = pack(quantize(model, "w8a8", SimpleNamespace(extra_rules=(), target="compressed-tensors:w8a8")))
    path = form.write(checkpoint(model), tmp_path / "out", "w8a8")
    ids = torch.arange(12).reshape(1, 12)
    assert same(form.read(path), checkpoint(model).tensors) == [] and torch.equal(form.model(path)(ids).logits, model(ids).logits)


def test_a_model_with_convolutions_and_buffers_keeps_them_in_full_precision(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3))
    known = model.config.to_dict() | {"architectures": [type(model).__name__]}
    assert set(form.plan(Checkpoint(known, dict(model.named_parameters())), "w4a16").values()) == {"full"}
    task = SimpleNamespace(extra_rules=(), target="compressed-tensors:w4a16")
    with pytest.raises(FormatError, match="this layer is a Conv2d|only matrices"):
        quantize(model, [Rule("*.convolution", weight=weight(4))], task)
    made = checkpoint(pack(quantize(model, [Rule("classifier.1", weight=weight(4))], task)))
    assert config(form.write(made, tmp_path / "out", "w4a16"))["ignore"] == []


# ---- packing ---------------------------------------------------------------------------------------------------------------------------------------

@there
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_words_are_those_of_the_package(bits, rows, cols, seed):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = torch.randint(0, 2**bits, (rows, cols), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    q = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(words(codes, bits), pack_to_int32(q, bits))
    assert torch.equal(words(codes.T.contiguous(), bits).T, pack_to_int32(q, bits, packed_dim=0))
    assert torch.equal(unpack_from_int32(words(codes, bits), bits, torch.Size((rows, cols))), q)


@there
@settings(max_examples=60, deadline=None)
@given(st.sampled_from([Uniform(2), Uniform(3), Uniform(4, narrow=True), Uniform(4, False), Uniform(8), Uniform(8, False), Ternary(), Sign(),
                        HalfStep(2), HalfStep(3), Stretched(4), Stretched(2)]),
       st.sampled_from([PerChannel(), PerTensor(), Group(8), Group(24), Block(3, 12)]),
       st.sampled_from([AbsMax(), AbsMax(dtype="bfloat16"), MinMax()]), st.integers(0, 2**31))
def test_a_layer_is_what_its_tensors_say(grid, grain, scale, seed):
    """Over grids, grains and scales: the smallest kind that takes it gives it back, bit for bit; and one always does."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    tensor = Quant(grid, grain, scale).quantize(torch.randn(9, 48, generator=torch.Generator().manual_seed(seed)))
    try:
        kind = KINDS[kind_of(tensor, None, "mixed")]
    except FormatError as refusal:
        assert isinstance(scale, MinMax) and not isinstance(grid, Uniform) and "zero points" in str(refusal)
        return
    made = store(tensor, kind)
    said = QuantizationScheme(targets=["Linear"], weights=kind.args(None if made.whole else made.size, made.symmetric), format=kind.format)
    parts = made.tensors | {"weight_scale": made.tensors["weight_scale"].float()}
    assert torch.equal(BaseCompressor.get_value_from_registry(kind.format).decompress(parts, said)["weight"], tensor.dequantize())


@pytest.mark.parametrize("grid, bits, found", [
    (Uniform(4), 4, (1, 0)), (Uniform(4), 3, None), (Uniform(4), 8, (1, 0)), (Uniform(3, False), 3, (1, 4)), (Uniform(3, False), 4, (1, 0)),
    (Sign(), 2, (1, 0)), (Stretched(4), 3, (4, 0)), (Stretched(3), 8, None)])
def test_integers_of_a_grid(grid, bits, found):
    assert integers(grid, bits) == found


@pytest.mark.parametrize("grain, size", [(PerChannel(), 48), (PerTensor(), 48), (Group(48), 48), (Group(16), 16), (Block(2, 8), 8),
                                         (PerChannel(-1), 1)])
def test_how_many_inputs_share_a_step(grain, size):
    assert sharing(grain, (4, 48)) == size


# ---- refusals --------------------------------------------------------------------------------------------------------------------------------------

HELD_NOT = [
    ("w4a16", weight(8), "no integers of 4 bits"), ("w3a16", weight(4), "no integers of 3 bits"), ("w4a16", Quant(Float(2, 1)), "no integers"),
    ("w8a16", Quant(Stretched(3)), "nor those over a power of two"), ("w8a16", Quant(Uniform(9)), "no integers of 8 bits"),
    ("w4a16", Quant(Uniform(4, None)), "signed=True"), ("w4a16", U4.but(scale=MinMax(zero="offset")), "offset"),
    ("w4a16", weight(4, Group(24)), "24 does not divide"), ("w8a8", weight(8, Group(32)), "one a channel"),
    ("w4a16", Quant(Uniform(4), Group(32), AbsMax(nested=NESTED)), "themselves quantized"),
    ("fp8a16", weight(8), "the one grid of float-quantized"), ("mxfp4a16", Quant(Float(2, 1), Group(16)), "each 32 inputs"),
    ("mxfp4a16", Quant(Float(2, 1), Group(32), AbsMax(nested=NESTED)), "themselves quantized"),
    ("nvfp4a16", Quant(Float(2, 1), Group(16), AbsMax(nested=Quant(Float(4, 3), PerTensor(), AbsMax()))), "one power of two"),
    ("mixed", Quant(Stretched(3)), "w2a16: the values"),
]


@pytest.mark.parametrize("target, quant, says", HELD_NOT, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_held_is_refused_with_the_nearest(target, quant, says):
    with pytest.raises(FormatError, match=says) as caught:
        form.fit(quant, target, (8, 64))
    assert f"compressed-tensors:{target}" in str(caught.value) and "nearest scheme" in str(caught.value)


def test_the_targets_that_would_hold_it_are_named():
    with pytest.raises(FormatError, match="hold these numbers: compressed-tensors:w8a16, compressed-tensors:w8a8;"):
        form.fit(weight(8), "w4a16", (8, 64))


def test_shapes_parts_and_unknown_targets():
    assert "shape (4, 8, 3)" in str(form.why_not(KINDS["w4a16"].own, "w4a16", (4, 8, 3)))
    tensor = weight(4).quantize(torch.randn(4, 32))
    assert "several parts" in str(form.why_not(Stacked([tensor]), "w4a16", (4, 32)))
    with pytest.raises(FormatError, match="nearest: compressed-tensors:w4a16"):
        form.fit(weight(4), "w4a15", (4, 32))
    with pytest.raises(FormatError, match="nearest: compressed-tensors"):
        export.target("compressed-tensor:w4a16")


def test_values_of_a_tensor_decide():
    float_zero = U4.quantize(torch.randn(4, 32))
    float_zero.zero += 0.5
    assert "no integers of 4 bits" in str(form.why_not(float_zero, "w4a16"))
    assert "no powers of two" in str(form.why_not(Quant(Float(2, 1), Group(32)).quantize(torch.randn(4, 32)), "mxfp4a16"))
    assert "E4M3 over one fp32" in str(form.why_not(Quant(Float(2, 1), Group(16)).quantize(torch.randn(4, 32)), "nvfp4a16"))
    two = Quant(Float(2, 1), Group(16), AbsMax(nested=Quant(Float(4, 3), PerTensor(), AbsMax()))).quantize(torch.randn(4, 32))
    assert "no power of two" in str(form.why_not(two, "nvfp4a16"))


INPUTS = [
    ("w4a16", weight(4), A8, "Linear", "file would say otherwise"), ("w8a8", weight(8), None, "Linear", "full precision, and the file"),
    ("w8a8", weight(8), A8.but(grid=Uniform(4)), "Linear", "say otherwise"), ("w8a8", weight(8), scheme("w8a8-static").input, "Linear", "otherwise"),
    ("w4a16", weight(4), None, "Conv1D", "this layer is a Conv1D"), ("w4a16", weight(4), None, "Embedding", "nn.Linear alone"),
    ("w8a8", None, A8, "Linear", "quantize both"), ("mixed", weight(8, Group(32)), A8, "Linear", "say otherwise"),
]


@pytest.mark.parametrize("target, quant, entry, module, says", INPUTS)
def test_inputs_that_the_file_cannot_say(target, quant, entry, module, says):
    with pytest.raises(FormatError, match=says):
        form.fit_input(entry, target, quant, (8, 64), module)


def test_a_rule_is_refused_before_training_with_its_layer():
    for rules, says in (([Rule("*proj", weight=weight(4), input=A8)], "q_proj: compressed-tensors:w4a16 cannot hold this layer: its input"),
                        ([Rule("*proj", weight=weight(4), output=A8)], "quantized output"),
                        ([Rule("*proj", weight=weight(4)), Rule("*self_attn:key", signal=A8)], "self_attn:key: .* inside attention"),
                        ([Rule("@embedding", weight=weight(4))], "this layer is a Embedding")):
        with pytest.raises(FormatError, match=says):
            quantize(llama(**SIZES), rules, SimpleNamespace(extra_rules=(), target="compressed-tensors:w4a16"))


def without(made, name):
    del made.tensors[name]


Q = "model.layers.0.self_attn.q_proj.weight"
BROKEN = {
    "class": (lambda made: made.config.update(architectures=["NoSuchModel"]), "knows no NoSuchModel"),
    "type": (lambda made: made.config.update(model_type="nothing"), "of type 'nothing'"),
    "missing": (lambda made: without(made, Q), "missing model.layers.0.self_attn.q_proj.weight"),
    "extra": (lambda made: made.tensors.update({"more.weight": torch.ones(2)}), "unknown more.weight"),
    "shape": (lambda made: made.tensors.update({"lm_head.weight": torch.ones(300, 64)}), "another shape lm_head.weight"),
    "NaN": (lambda made: made.tensors.update({"lm_head.weight": torch.full((310, 64), torch.nan)}), "NaN"),
    "bits": (lambda made: made.tensors.update({Q: weight(8).quantize(torch.randn(64, 64))}), "q_proj.weight, shape .* no integers of 4 bits"),
    "embedding": (lambda made: made.tensors.update({"model.embed_tokens.weight": weight(4).quantize(torch.randn(310, 64))}), "a Embedding"),
    "input": (lambda made: made.inputs.update({Q.removesuffix(".weight"): A8}), "its input is quantized"),
    "input alone": (lambda made: made.inputs.update({"lm_head": A8}), "lm_head quantizes its input and not its weight"),
    "signal": (lambda made: setattr(made, "signals", ("model.layers.0.self_attn:key",)), "quantized signal"),
    "nothing": (lambda made: made.tensors.update({n: t.dequantize() for n, t in made.tensors.items() if isinstance(t, QTensor)}), "no layer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_refusal_leaves_nothing_behind(case, tmp_path):
    spoil, says = BROKEN[case]
    model = llama(**SIZES)
    tensors = {n: weight(4).quantize(t) if n.split(".")[-2] in MATRICES else t for n, t in model.state_dict().items()}
    made = Checkpoint(model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, tensors)
    spoil(made)
    with pytest.raises(FormatError, match=says):
        form.write(made, tmp_path / "out", "w4a16")
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_way_stays(tmp_path):
    made = checkpoint(packed("w4a16", Rule("*proj", weight=weight(4))))
    (tmp_path / "out").mkdir()
    assert form.write(made, tmp_path / "out", "w4a16").is_dir(), "an empty directory is not in the way"
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for name in ("out", "file"):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(FormatError, match="exists"):
            form.write(made, tmp_path / name, "w4a16")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} and len(list(tmp_path.iterdir())) == 2


# ---- reading ---------------------------------------------------------------------------------------------------------------------------------------

@there
def test_broken_directories_are_said_so(tmp_path):
    path = form.write(checkpoint(packed("w4a16", Rule("*proj", weight=weight(4)))), tmp_path / "out", "w4a16")
    whole, said = (path / "model.safetensors").read_bytes(), (path / "config.json").read_text()
    for length in (0, 7, 200, len(whole) // 2, len(whole) - 1):
        (path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(FormatError, match="no whole safetensors file"):
            form.read(path)
    (path / "model.safetensors").write_bytes(whole)
    for text, says in (("{", "cannot be read"), ("{}", "quantization is by None"), (said.replace('"compressed-tensors"', '"gptq"'), "by 'gptq'"),
                       (said.replace('"num_bits"', '"bits"'), "refuses"), (said.replace('"Linear"', '"Conv"'), "no config group has the layer"),
                       (said.replace('"pack-quantized"', '"int-quantized"'), "not what its config group says")):
        (path / "config.json").write_text(text)
        with pytest.raises(FormatError, match=says):
            form.read(path)
    with pytest.raises(FormatError, match="no compressed-tensors directory"):
        form.read(tmp_path / "none")


def test_without_the_package(tmp_path, monkeypatch):
    """Writing needs none; reading says which extra to install, and a proof is not made."""
    monkeypatch.setattr("qatlas.export.compressed_tensors.readers.find_spec", lambda name: None)
    model = packed("w4a16", Rule("*proj", weight=weight(4)))
    save(model, tmp_path / "out")
    path = form.write(checkpoint(model), export.place(tmp_path / "out/exports", "compressed-tensors:w4a16"), "w4a16")
    with pytest.raises(FormatError, match=r"pip install 'qatlas\[compressed-tensors\]'"):
        form.read(path)
    assert "qatlas[compressed-tensors]" in form.model(path)
    assert [proof.passed for proof in verify(tmp_path / "out")] == [True, None]


# ---- proofs ----------------------------------------------------------------------------------------------------------------------------------------

@there
def test_proofs_pass_and_a_flipped_bit_fails_them(tmp_path):
    model = packed("w8a8", Rule("*proj", weight=weight(8), input=A8))
    save(model, tmp_path / "out")
    path = form.write(checkpoint(model), export.place(tmp_path / "out/exports", "compressed-tensors:w8a8"), "w8a8")
    proofs = verify(tmp_path / "out", trained=load_packed(tmp_path / "out"))
    assert [proof.passed for proof in proofs] == [True] * 4, proofs
    assert proofs[3].claim == "compressed-tensors:w8a8 computes what the packed model computes" and "21 tensors (14 quantized)" in proofs[2].result
    raw = (path / "config.json").read_text()
    (path / "config.json").write_text(raw.replace('"token"', '"tensor"'))          # the weights are right, the inputs are not
    assert [proof.passed for proof in verify(tmp_path / "out")] == [True, True, False]
    (path / "config.json").write_text(raw)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    assert [proof.passed for proof in verify(tmp_path / "out")] == [True, False]
