"""torchao: fake equals packed equals what torchao's own tensors give, and transformers computes what we compute. Nothing in a file is believed."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import MATRICES, llama

from qatlas import export
from qatlas.core.error import FormatError
from qatlas.core.grain import Block, Group, PerChannel, PerTensor
from qatlas.core.grid import HalfStep, Sign, Stretched, Ternary, Uniform
from qatlas.core.qtensor import QTensor, Stacked
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, AbsMean, MinMax
from qatlas.core.scheme import scheme, weight
from qatlas.export import Checkpoint
from qatlas.export import torchao as form
from qatlas.export.torchao.fitting import INPUT, KINDS, kind_of
from qatlas.export.torchao.layout import load, store
from qatlas.model.pack import checkpoint, load_packed, pack, save
from qatlas.model.proof import TIES
from qatlas.model.roles import Role
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.model.verify import verify

A8 = scheme("w4a8").input
U4 = Quant(Uniform(4, False), Group(32), MinMax())
SIZES = {"hidden_size": 64, "intermediate_size": 128}
IDS = torch.arange(40).reshape(2, 20)
there = pytest.mark.skipif(bool(form.lacks()), reason="needs torchao")


def packed(kind, *rules, tied=False):
    rules = [*rules, *keep_full(Role.EMBEDDING, Role.HEAD)]
    return pack(quantize(llama(tied, **SIZES), rules, SimpleNamespace(extra_rules=(), target=f"torchao:{kind}")))


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
    """A directory with groups and zeros, to be copied and damaged."""
    return form.write(checkpoint(packed("w4a16", Rule("*proj", weight=U4))), tmp_path_factory.mktemp("written") / "out", "w4a16")


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


# ---- what is written is what was trained -----------------------------------------------------------------------------------------------------------

CASES = {
    "w4a16 groups": ("w4a16", weight(4, Group(32)), {"int4": 14}),
    "w4a16 one step a tensor": ("w4a16", weight(4, PerTensor()), {"int4": 14}),
    "w4a16 zeros": ("w4a16", U4, {"int4": 14}),
    "w3a16 half steps": ("w3a16", Quant(HalfStep(2), Group(16), AbsMean()), {"int3": 14}),
    "w2a16 signs": ("w2a16", weight(1), {"int2": 14}),
    "w1a16": ("w1a16", Quant(Uniform(1)), {"int1": 14}),
    "w8a16 tiles": ("w8a16", Quant(Uniform(8), Block(16, 16), AbsMax(dtype="float16")), {"int8": 14}),
}


@there
@pytest.mark.parametrize("case", CASES)
def test_torchao_and_transformers_read_the_trained_numbers(case, tmp_path):
    kind, quant, count = CASES[case]
    model = packed(kind, Rule("*proj", weight=quant))
    path = form.write(checkpoint(model), tmp_path / "out", kind)
    hold_the_same(path, checkpoint(model))
    assert form.types(path) == {**count, "full": 7} and form.near(path) is None and form.holds(path)
    theirs = form.model(path)
    assert type(theirs.model.layers[0].mlp.up_proj.weight).__name__ == "IntxUnpackedToInt8Tensor"
    assert torch.equal(theirs(IDS).logits, model(IDS).logits)
    assert said(path)["modules_to_not_convert"] == ["lm_head"] and "IntxWeightOnlyConfig" in str(said(path)["quant_type"])


@there
@pytest.mark.parametrize("quant", [weight(4, Group(32)), U4, weight(8)], ids=["groups", "zeros", "channels"])
def test_dynamic_inputs_come_near(quant, tmp_path):
    kind = f"w{quant.bits}a8"
    model = packed(kind, Rule("*proj", weight=quant, input=A8))
    path = form.write(checkpoint(model), tmp_path / "out", kind)
    hold_the_same(path, checkpoint(model))
    ours, theirs = model(IDS).logits, form.model(path)(IDS).logits
    assert "ties" in form.near(path) and (ours - theirs).abs().max() < TIES * ours.abs().max()
    bare = form.write(replaced(checkpoint(model), inputs={}), tmp_path / "bare", f"w{quant.bits}a16")
    assert (form.model(bare)(IDS).logits - ours).abs().max() > 10 * (theirs - ours).abs().max(), "the inputs are quantized, and it shows"


def replaced(made, **changes):
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@there
def test_mixed_is_a_config_for_each_name(tmp_path):
    model = packed("mixed", Rule("*down_proj", weight=weight(8), input=A8), Rule("*o_proj", weight=None, input=None),
                   Rule("*q_proj", weight=weight(2, Group(16))), Rule("*proj", weight=weight(4, Group(32))))
    path = form.write(checkpoint(model), tmp_path / "out", "mixed")
    hold_the_same(path, checkpoint(model))
    quant_type = said(path)["quant_type"]["default"]
    named = quant_type["_data"]["fqn_to_config"]
    assert quant_type["_type"] == "FqnToConfig" and len(named) == 12 and form.types(path) == {"int2": 2, "int4": 8, "int8": 2, "full": 9}
    assert named["model.layers.1.mlp.down_proj"]["_type"] == "Int8DynamicActivationIntxWeightConfig"
    assert named["model.layers.0.self_attn.q_proj"]["_data"]["granularity"]["_data"] == {"group_size": 16}
    assert sorted(said(path)["modules_to_not_convert"]) == ["lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    ours, theirs = model(IDS).logits, form.model(path)(IDS).logits
    assert (ours - theirs).abs().max() < TIES * ours.abs().max()


@there
def test_tied_heads_and_the_auto_class_and_bf16_afterwards(tmp_path):
    from transformers import AutoModelForCausalLM

    model = packed("w4a16", Rule("*proj", weight=weight(4, Group(32))), tied=True)
    model.config.dtype = torch.bfloat16
    path = form.write(checkpoint(model), tmp_path / "out", "w4a16")
    theirs = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(theirs(IDS).logits, model(IDS).logits), "the file says fp32, whatever the model said"
    before = theirs.model.layers[0].mlp.up_proj.weight.scale.clone()
    theirs.to(torch.bfloat16)
    after = theirs.model.layers[0].mlp.up_proj.weight.scale
    assert after.dtype == torch.bfloat16 and torch.equal(after.float(), before) and theirs(IDS).logits.dtype == torch.bfloat16


@there
def test_torchao_would_write_the_same_header_and_config(written):
    """Our JSON is what torchao makes of its own objects."""
    from torchao.core.config import config_from_dict, config_to_dict
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import IntxUnpackedToInt8Tensor

    from qatlas.export.folder import Tensors

    found, name = Tensors.of(written), "model.layers.0.mlp.up_proj"
    part = {one: found.values[f"{name}._weight_{one}"] for one in ("qdata", "scale", "zero_point")}
    tensor = IntxUnpackedToInt8Tensor(*part.values(), torch.int4, [1, 32], torch.float32, None)
    flat, header = flatten_tensor_state_dict({f"{name}.weight": tensor})
    assert set(flat) == {f"{name}._weight_{one}" for one in part}
    assert json.loads(header[f"{name}.weight"]) == json.loads(found.header[f"{name}.weight"])
    again = config_to_dict(config_from_dict(said(written)["quant_type"]["default"]))
    ours = said(written)["quant_type"]["default"]
    assert again["_type"] == ours["_type"] and again["_version"] == ours["_version"]
    assert {key: again["_data"][key] for key in ours["_data"]} == ours["_data"]


# ---- packing ---------------------------------------------------------------------------------------------------------------------------------------

@settings(max_examples=80, deadline=None)
@given(st.sampled_from([Uniform(1), Uniform(2), Uniform(3), Uniform(4, narrow=True), Uniform(5, False), Uniform(6), Uniform(7), Uniform(8),
                        Uniform(8, False), Ternary(), Sign(), HalfStep(2), Stretched(4)]),
       st.sampled_from([PerChannel(), PerTensor(), Group(8), Group(24), Block(3, 12)]),
       st.sampled_from([AbsMax(), AbsMax(dtype="bfloat16"), MinMax()]), st.integers(0, 2**31))
def test_a_layer_is_what_its_tensors_say(grid, grain, scale, seed):
    """Over grids, grains and scales: the smallest kind that takes it gives it back, bit for bit; and torchao's own decode is that too."""
    tensor = Quant(grid, grain, scale).quantize(torch.randn(9, 48, generator=torch.Generator().manual_seed(seed)))
    try:
        kind = KINDS[kind_of(tensor, None, "mixed")]
    except FormatError as refusal:
        assert isinstance(scale, MinMax) and not isinstance(grid, Uniform) and "zero points" in str(refusal)
        return
    made = store(tensor, kind)
    assert all(tensor.is_contiguous() for tensor in made.tensors.values())
    again = load("layer.weight", json.loads(json.dumps(made.said)), made.tensors)
    assert torch.equal(again.dequantize(), tensor.dequantize()) and again.bits == kind.bits
    if not form.lacks():
        from torchao.quantization import IntxUnpackedToInt8Tensor

        theirs = IntxUnpackedToInt8Tensor(*made.tensors.values(), getattr(torch, f"int{kind.bits}"), made.said["_data"]["block_size"], torch.float32,
                                          None)
        assert torch.equal(theirs.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("block, zeros, dtype", [([1, 12], torch.int8, torch.bfloat16), ([6, 48], torch.float32, torch.float32),
                                                 ([2, 16], torch.float16, torch.float16), ([1, 48], torch.int8, torch.float32)])
def test_what_others_write_is_read_as_torchao_reads_it(block, zeros, dtype):
    """Tiles, whole tensors, floats as zeros, steps of two bytes: after `.to(torch.float32)`."""
    torch.manual_seed(0)
    shape = (6 // block[0], 48 // block[1])
    part = {"qdata": torch.randint(-8, 8, (6, 48), dtype=torch.int8), "scale": torch.rand(shape).to(dtype),
            "zero_point": (torch.randn(shape) * 4).to(zeros)}
    name = str(dtype).removeprefix("torch.")
    about = {"target_dtype": {"_type": "torch.dtype", "_data": "int4"}, "block_size": block, "dtype": {"_type": "torch.dtype", "_data": name},
             "activation_quantization": None}
    found = load("layer.weight", {"_type": "IntxUnpackedToInt8Tensor", "_data": about, "_tensor_data_names": list(part)}, part)
    scale, zero = (part[one].float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1) for one in ("scale", "zero_point"))
    assert torch.equal(found.dequantize(), (part["qdata"].float() - zero) * scale)
    if not form.lacks():
        from torchao.quantization import IntxUnpackedToInt8Tensor

        theirs = IntxUnpackedToInt8Tensor(*part.values(), torch.int4, block, dtype, None)
        assert torch.equal(found.dequantize(), theirs.to(torch.float32).dequantize())


# ---- refusals --------------------------------------------------------------------------------------------------------------------------------------

NESTED = AbsMax(nested=Quant(Uniform(6, False), PerTensor(), AbsMax()))
HELD_NOT = [
    ("w4a16", weight(8), "no integers of 4 bits"), ("w1a16", weight(1), "no integers of 1 bits"), ("w8a16", Quant(Stretched(3)), "power of two"),
    ("w8a16", Quant(Uniform(9)), "no integers of 8 bits"), ("w4a16", Quant(Uniform(4, None)), "signed=True"),
    ("w4a16", U4.but(scale=MinMax(zero="offset")), "offset"), ("w4a16", weight(4, Group(24)), "24 does not divide"),
    ("w4a16", Quant(Uniform(4), Group(32), NESTED), "themselves quantized"), ("mixed", Quant(Stretched(3)), "8 bits"),
    ("w4a16", Quant(Uniform(4), PerChannel(1)), None),
]


@pytest.mark.parametrize("target, quant, says", HELD_NOT, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_held_is_refused_with_the_nearest(target, quant, says):
    if says is None:                                              # a step an input is a group of one
        assert form.fit(quant, target, (8, 64)).scale.dtype == "bfloat16"
        return
    with pytest.raises(FormatError, match=says) as caught:
        form.fit(quant, target, (8, 64))
    assert f"torchao:{target}" in str(caught.value) and "nearest scheme" in str(caught.value)


def test_the_targets_that_would_hold_it_are_named():
    with pytest.raises(FormatError, match="hold these numbers: torchao:w7a16, torchao:w8a16, torchao:w7a8, torchao:w8a8;"):
        form.fit(weight(7), "w4a16", (8, 64))


def test_shapes_parts_values_and_unknown_targets():
    assert "shape (4, 8, 3)" in str(form.why_not(KINDS["w4a16"].own.but(grain=PerChannel()), "w4a16", (4, 8, 3)))
    tensor = weight(4).quantize(torch.randn(4, 32))
    assert "several parts" in str(form.why_not(Stacked([tensor]), "w4a16", (4, 32)))
    zero = U4.quantize(torch.randn(4, 32))
    zero.zero += 0.5
    assert "no integers of 4 bits" in str(form.why_not(zero, "w4a16"))
    tensor.scale[0] = torch.inf
    assert "NaN or infinite" in str(form.why_not(tensor, "w4a16"))
    with pytest.raises(FormatError, match="nearest: torchao:w4a16"):
        form.fit(weight(4), "w4a15", (4, 32))


def test_inputs():
    assert form.fit_input(A8, "w4a8", weight(4), (8, 64), "Linear") == INPUT.but(estimator=A8.estimator)
    assert form.fit_input(A8, "mixed", weight(4), (8, 64), "Linear").scale == MinMax()
    for target, quant, entry, module, says in (
            ("w4a16", weight(4), A8, "Linear", "file would say otherwise"), ("w4a8", weight(4), None, "Linear", "full precision, and the file"),
            ("w4a8", weight(4), A8.but(grid=Uniform(4)), "Linear", "say otherwise"), ("w4a16", weight(4), None, "Conv1D", "this layer is a Conv1D"),
            ("w8a8", weight(8), scheme("w8a8-static").input, "Linear", "otherwise"), ("w4a8", None, A8, "Linear", "quantize both")):
        with pytest.raises(FormatError, match=says):
            form.fit_input(entry, target, quant, (8, 64), module)


def test_a_refusal_leaves_nothing_behind(tmp_path):
    model = llama(**SIZES)
    tensors = {n: weight(4).quantize(t) if n.split(".")[-2] in MATRICES else t for n, t in model.state_dict().items()}
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    for target, change, says in (("w3a16", {}, "no integers of 3 bits"), ("w4a8", {}, "its input is in full precision"),
                                 ("w4a16", {"lm_head.weight": torch.ones(300, 64)}, "another shape"),
                                 ("w4a16", {"model.embed_tokens.weight": weight(4).quantize(torch.randn(310, 64))}, "a Embedding")):
        with pytest.raises(FormatError, match=says):
            form.write(Checkpoint(config, tensors | change), tmp_path / "out", target)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FormatError, match="exists"):
        form.write(Checkpoint(config, tensors), tmp_path / "out", "w4a16")


# ---- reading what nobody should believe ------------------------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"


def rewritten(path, change):
    """The directory with its tensors and header changed."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path / "model.safetensors", framework="pt") as file:
        header, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, header)
    save_file(tensors, path / "model.safetensors", metadata=header)


def line(**changes):
    def change(tensors, header):
        about = json.loads(header[f"{Q}.weight"])
        for name, value in changes.items():
            (about if name.startswith("_") else about["_data"])[name] = value
        header[f"{Q}.weight"] = json.dumps(about)
    return change


def part(name, make):
    def change(tensors, header):
        tensors[f"{Q}._weight_{name}"] = make(tensors[f"{Q}._weight_{name}"]).contiguous()
    return change


DAMAGE = {
    "no header": (lambda t, h: h.pop("tensor_names"), "no header"), "no JSON": (lambda t, h: h.update(tensor_names="["), "no header"),
    "no list": (lambda t, h: h.update(tensor_names='"lm_head.weight"'), "no header"), "none": (lambda t, h: h.update(tensor_names="[]"), "no header"),
    "twice": (lambda t, h: h.update(tensor_names=json.dumps([f"{Q}.weight"] * 2)), "different names"),
    "deep": (lambda t, h: h.update(tensor_names="[" * 100000), "no header"), "no object": (lambda t, h: h.update({f"{Q}.weight": "3"}), "object"),
    "nothing said": (lambda t, h: h.pop(f"{Q}.weight"), "no header"), "part": (lambda t, h: t.pop(f"{Q}._weight_scale"), "lacks .*_weight_scale"),
    "plain": (lambda t, h: t.pop("lm_head.weight"), "lacks lm_head.weight"), "more": (lambda t, h: t.update(x=torch.ones(1)), "holds x"),
    "class": (line(_type="Int4Tensor"), "'Int4Tensor' of torchao"), "names": (line(_tensor_data_names=["qdata"]), "its tensors are called"),
    "names of no list": (line(_tensor_data_names=7), "its tensors are called"), "data": (line(_data=[]), "its attributes"),
    "more data": (line(extra=1), "its attributes"), "dtype": (line(dtype={"_type": "torch.dtype", "_data": "load"}), "dtype is"),
    "target": (line(target_dtype={"_type": "torch.dtype", "_data": "int9"}), "target_dtype is"), "narrow": (
        line(target_dtype={"_type": "torch.dtype", "_data": "int2"}), "beyond 2 bits"),
    "block": (line(block_size=[1, 0]), "block_size is"), "block of 3": (line(block_size=[1, 1, 32]), "block_size is"),
    "block of truth": (line(block_size=[True, 32]), "block_size is"), "huge": (line(block_size=[1, 2**62]), "do not tile"),
    "other block": (line(block_size=[1, 16]), "scale is float32"), "activation": (line(activation_quantization="x"), "activation_quantization"),
    "codes": (part("qdata", lambda t: t.float()), "int8 matrix"), "flat": (part("qdata", lambda t: t.flatten()), "int8 matrix"),
    "empty": (part("qdata", lambda t: t[:0]), "int8 matrix"), "steps": (part("scale", lambda t: t[:1]), "scale is float32"),
    "step of integers": (part("scale", lambda t: t.to(torch.int32)), "scale is int32"), "NaN": (part("scale", lambda t: t * torch.nan), "NaN"),
    "zeros": (part("zero_point", lambda t: t.to(torch.int64)), "zero_point is int64"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_said_so(case, copied):
    change, says = DAMAGE[case]
    rewritten(copied, change)
    with pytest.raises(FormatError, match=says):
        form.qtensors(copied)
    if not form.lacks():
        for reader in (form.read, form.model):
            with pytest.raises(FormatError, match=says):
                reader(copied)


def test_truncated_and_foreign_directories(copied, tmp_path):
    whole, config = (copied / "model.safetensors").read_bytes(), (copied / "config.json").read_text()
    for length in (0, 7, 200, len(whole) // 2, len(whole) - 1):
        (copied / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(FormatError, match="no whole safetensors file"):
            form.qtensors(copied)
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(FormatError, match="pytorch_model.bin: pickle files are never opened"):
        form.qtensors(copied)
    for text, says in (("{", "cannot be read"), ("[" * 100000, "cannot be read"), ("{}", "by None"), ("[]", "holds a list"),
                       (config.replace('"torchao"', '"gptq"'), "by 'gptq'")):
        (copied / "config.json").write_text(text)
        assert not form.holds(copied)
        with pytest.raises(FormatError, match=says):
            form.qtensors(copied)
    assert not form.holds(tmp_path / "none")
    with pytest.raises(FormatError, match="no torchao directory"):
        form.qtensors(tmp_path / "none")


@there
@pytest.mark.parametrize("change, says", [
    (lambda c: c["quantization_config"]["quant_type"]["default"].update(_type="quantize_"), "asks torchao for 'quantize_'"),
    (lambda c: c["quantization_config"]["quant_type"]["default"]["_data"].update(granularity={"_type": "Foo", "_data": {}}), "'Foo'"),
    (lambda c: c["quantization_config"].update(quant_type={}), "cannot load"), (lambda c: c["quantization_config"].pop("quant_type"), "cannot load"),
    (lambda c: c.update(architectures=["pipeline"]), "no model class"), (lambda c: c.update(architectures={}), "no model class"),
    (lambda c: c.update(hidden_size="wide"), "cannot load")])
def test_a_hostile_config_reaches_nobody(change, says, copied):
    config = json.loads((copied / "config.json").read_text())
    change(config)
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=says):
        form.model(copied)


def test_shards_are_one_file(copied):
    from safetensors.torch import save_file

    from qatlas.export.folder import Tensors

    whole = Tensors.of(copied)
    names = sorted(whole.values)
    (copied / "model.safetensors").unlink()
    for i, some in enumerate((names[:20], names[20:])):
        save_file({name: whole.values[name] for name in some}, copied / f"model-{i + 1:05}-of-00002.safetensors", metadata=whole.header)
    assert form.types(copied) == {"int4": 14, "full": 7}
    save_file({names[0]: whole.values[names[0]]}, copied / "model-00003-of-00003.safetensors", metadata=whole.header)
    with pytest.raises(FormatError, match="stands in another file too"):
        form.qtensors(copied)


def test_without_the_package(copied, monkeypatch):
    """Writing and `qtensors` need none; reading says which extra to install."""
    monkeypatch.setattr("qatlas.export.torchao.readers.find_spec", lambda name: None)
    assert form.types(copied)["int4"] == 14 and "qatlas[torchao]" in form.model(copied)
    with pytest.raises(FormatError, match=r"pip install 'qatlas\[torchao\]'"):
        form.read(copied)


# ---- proofs ----------------------------------------------------------------------------------------------------------------------------------------

@there
def test_proofs_pass_and_a_flipped_bit_fails_them(tmp_path):
    model = packed("w8a8", Rule("*proj", weight=weight(8), input=A8))
    save(model, tmp_path / "out")
    path = form.write(checkpoint(model), export.place(tmp_path / "out/exports", "torchao:w8a8"), "w8a8")
    proofs = verify(tmp_path / "out", trained=load_packed(tmp_path / "out"))
    assert [proof.passed for proof in proofs] == [True] * 4, proofs
    assert "14 int8" in proofs[2].result and "ties of activations" in proofs[3].tolerance and "logits within" in proofs[3].result
    file = path / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert [proof.passed for proof in verify(tmp_path / "out")] == [True, False]
