"""AWQ: bytes by hand, words as AutoAWQ packs them, the decode of compressed-tensors, directories of ours and of others."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_llama import llama

from qatlas import export
from qatlas.core.error import FormatError
from qatlas.core.grain import Group, PerChannel, PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.qtensor import QTensor
from qatlas.core.quantizer import Quant
from qatlas.core.scale import MinMax
from qatlas.core.scheme import scheme, weight
from qatlas.export import awq as form
from qatlas.export.awq.layout import restore, store
from qatlas.model.pack import checkpoint, load_packed, pack, save
from qatlas.model.roles import Role
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.model.verify import verify

U4 = Quant(Uniform(4, False), Group(32), MinMax())
SIZES = {"hidden_size": 64, "intermediate_size": 128}
Q = "model.layers.0.self_attn.q_proj"
there = pytest.mark.skipif(bool(form.lacks()), reason=str(form.lacks()))


def packed(*rules, **sizes):
    """A packed tiny Llama, trained for the target by nobody."""
    rules = [*rules, *keep_full(Role.EMBEDDING, Role.HEAD)]
    return pack(quantize(llama(**{**SIZES, **sizes}), rules, SimpleNamespace(extra_rules=(), target="awq:w4")))


def same(found, tensors):
    values = {name: t.dequantize() if isinstance(t, QTensor) else t.float() for name, t in found.items()}
    return [name for name, t in tensors.items() if not torch.equal(values[name], t.dequantize() if isinstance(t, QTensor) else t)]


def words(tensor):
    return [f"{word & 0xFFFFFFFF:08x}" for word in tensor.flatten().tolist()]


# ---- bytes ---------------------------------------------------------------------------------------------------------------------------------------

def test_a_layer_by_hand():
    """8 outputs of 2 inputs: output n has the codes n and n + 8, the zero n + 1. From the low end a word holds outputs 0 2 4 6 1 3 5 7."""
    n = torch.arange(8)
    tensor = QTensor(torch.stack([n, n + 8], 1).to(torch.uint8), (n + 1) / 2, n + 1.0, None, Uniform(4, False), PerChannel(), "float16")
    made = store(tensor, "w4", -1)
    assert words(made.qweight) == ["75316420", "fdb9eca8"] and made.qweight.shape == (2, 1)
    assert words(made.qzeros) == ["86427531"] and made.scales.tolist() == [[0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]]
    assert restore(made).dequantize().tolist() == [[(n + 1) / 2 * (n - n - 1), (n + 1) / 2 * (n + 8 - n - 1)] for n in range(8)]


def test_around_zero_all_zeros_lie_in_the_middle():
    tensor = Quant(Uniform(4)).quantize(torch.randn(8, 4))
    back = restore(store(tensor, "w4", -1))
    assert words(store(tensor, "w4", -1).qzeros) == ["88888888"] and back.zero is None and torch.equal(back.codes, tensor.codes)


def test_words_are_those_of_autoawq():
    """sha256 of what `from_linear` of AutoAWQ 0.2.9 (gemm.py) made of these codes, zeros and steps."""
    n, k, group = torch.arange(32)[:, None], torch.arange(64)[None], torch.arange(2)[None]
    codes, zeros, steps = (7 * n + 5 * k + n * k) % 16, (3 * n + group) % 16, (1 + n + group) / 64
    made = store(QTensor(codes.to(torch.uint8), steps, zeros.float(), None, Uniform(4, False), Group(32), "float16"), "w4", 32)
    assert [hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16] for t in made[:2]] == ["d691284bfb0e97c9", "9db7b158793c7783"]


@settings(max_examples=60, deadline=None)
@given(st.booleans(), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_a_layer_comes_back_as_it_was(zeros, outs, groups, seed):
    draw = torch.Generator().manual_seed(seed)
    shape = (8 * outs, 32 * groups)
    codes = torch.randint(0, 16, shape, generator=draw, dtype=torch.uint8)
    zero = torch.randint(0, 16, (shape[0], groups), generator=draw).float() if zeros else None
    steps = torch.rand(shape[0], groups, generator=draw).half().float()
    tensor = QTensor(codes, steps, zero, None, Uniform(4, not zeros), Group(32), "float16")
    made = store(tensor, "w4", 32)
    back = restore(made)
    assert torch.equal(back.dequantize(), tensor.dequantize()) and torch.equal(back.codes, codes)
    n = int(torch.randint(0, shape[0], (), generator=draw))
    place = (0, 4, 1, 5, 2, 6, 3, 7)[n % 8]                       # of an output in its word
    assert int(made.qweight[7, n // 8]) >> 4 * place & 15 == int(codes[n, 7])


# ---- the whole directory ---------------------------------------------------------------------------------------------------------------------------

CASES = {"groups": (weight(4, Group(32)), 32), "channels": (weight(4), -1), "a tensor": (weight(4, PerTensor()), -1), "zeros": (U4, 32),
         "zeros, channels": (Quant(Uniform(4, False), PerChannel(), MinMax()), -1), "three bits": (weight(3, Group(64)), 64),
         "ternary": (weight(1.58), -1)}


@pytest.mark.parametrize("case", CASES)
def test_a_directory_comes_back_bit_for_bit(case, tmp_path):
    quant, group = CASES[case]
    model = packed(Rule("*proj", weight=quant))
    made = checkpoint(model)
    path = form.write(made, tmp_path / "out", "w4")
    found = form.qtensors(path)
    assert same(found, made.tensors) == [] and set(found) == set(made.tensors) and form.holds(path)
    assert sum(isinstance(t, QTensor) for t in found.values()) == 14
    said = json.loads((path / "config.json").read_text())["quantization_config"]
    assert said == {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm",
                    "modules_to_not_convert": ["lm_head"]}
    if not form.lacks():
        assert same(form.read(path), made.tensors) == [] and set(form.read(path)) == set(made.tensors)


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_trained_logits(case, tmp_path):
    pytest.importorskip("gptqmodel", reason="transformers loads awq through gptqmodel, which is not installed")
    model = packed(Rule("*.1.self_attn.o_proj", weight=None), Rule("*proj", weight=CASES[case][0]))
    path = form.write(checkpoint(model), tmp_path / "out", "w4")
    ids = torch.arange(40).reshape(2, 20)
    assert torch.equal(form.model(path)(ids).logits, model(ids).logits)


def test_biases_and_layers_in_full_precision(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                         vocab_size=96, tie_word_embeddings=True)).eval()
    torch.nn.init.normal_(model.model.layers[1].self_attn.q_proj.bias)
    rules = [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*.0.self_attn.v_proj", weight=None), Rule("*proj", weight=U4)]
    model = pack(quantize(model, rules, SimpleNamespace(extra_rules=(), target="awq:w4")))
    path = form.write(checkpoint(model), tmp_path / "out", "w4")
    assert same(form.qtensors(path), checkpoint(model).tensors) == []
    said = json.loads((path / "config.json").read_text())["quantization_config"]
    assert sorted(said["modules_to_not_convert"]) == ["lm_head", "model.layers.0.self_attn.v_proj"]
    ids = torch.arange(40).reshape(2, 20)
    loaded = form.model(path)
    assert "gptqmodel" in loaded if isinstance(loaded, str) else torch.equal(loaded(ids).logits, model(ids).logits)


# ---- checkpoints of others -------------------------------------------------------------------------------------------------------------------------

def alone(path, parts, **said):
    """A directory with one layer."""
    path.mkdir(exist_ok=True)
    save_file({f"{Q}.{name}": part.contiguous() for name, part in parts.items()}, path / "model.safetensors")
    said = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"} | said
    (path / "config.json").write_text(json.dumps({"quantization_config": said}))
    return path


def layer(quant=U4):
    quant = form.fit(quant, "w4", (32, 128))
    tensor = quant.quantize(torch.randn(32, 128, generator=torch.Generator().manual_seed(0)))
    return tensor, store(tensor, "w4", 32)._asdict()


def test_old_files_and_files_without_zeros(tmp_path):
    tensor, parts = layer()
    path = alone(tmp_path / "in", parts)
    (path / "config.json").write_text("{}")
    (path / "quant_config.json").write_text(json.dumps({"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}))
    assert form.holds(path) and torch.equal(form.qtensors(path)[f"{Q}.weight"].dequantize(), tensor.dequantize())
    tensor, parts = layer(weight(4, Group(32)))
    path = alone(tmp_path / "middle", {name: part for name, part in parts.items() if name != "qzeros"}, zero_point=False)
    assert torch.equal(form.qtensors(path)[f"{Q}.weight"].dequantize(), tensor.dequantize())
    if not form.lacks():
        assert torch.equal(form.read(path)[f"{Q}.weight"], tensor.dequantize())


def changed(name, change):
    return lambda parts: parts | {name: change(parts[name])}


DAMAGED = {
    "no zeros": (lambda parts: {n: t for n, t in parts.items() if n != "qzeros"}, {}, "no qzeros"),
    "no steps": (lambda parts: {n: t for n, t in parts.items() if n != "scales"}, {}, "no scales"),
    "a part": (lambda parts: parts | {"g_idx": torch.zeros(1)}, {}, "g_idx is a part that AWQ does not know"),
    "rank": (changed("qweight", torch.flatten), {}, "no I32, F16 and I32 matrices"),
    "type": (changed("qweight", torch.Tensor.short), {}, "qweight is I16"),
    "steps' type": (changed("scales", torch.Tensor.int), {}, "scales I32"),
    "zeros' type": (changed("qzeros", torch.Tensor.float), {}, "qzeros F32"),
    "outputs": (changed("qweight", lambda t: t[:, :3]), {}, "not those of one layer"),
    "groups": (changed("scales", lambda t: t[:3]), {}, "not those of one layer"),
    "zeros": (changed("qzeros", lambda t: t[:, :3]), {}, "not those of one layer"),
    "empty": (changed("scales", lambda t: t[:0]), {}, "not those of one layer"),
    "nothing": (lambda parts: {"qweight": torch.zeros(0, 10**9, dtype=torch.int32), "qzeros": torch.zeros(0, 10**9, dtype=torch.int32),
                               "scales": torch.zeros(0, 8 * 10**9, dtype=torch.float16)}, {}, "not those of one layer"),
    "NaN": (changed("scales", lambda t: t * torch.nan), {}, "NaN"),
    "other group": (lambda parts: parts, {"group_size": 64}, "config.json says group_size=64"),
    "bits": (lambda parts: parts, {"bits": 8}, "bits=8"),
    "group": (lambda parts: parts, {"group_size": "128"}, "group_size='128'"),
    "layout": (lambda parts: parts, {"version": "gemv"}, "made for one kernel"),
    "version": (lambda parts: parts, {"version": 3}, "made for one kernel"),
    "method": (lambda parts: parts, {"quant_method": "gptq"}, "describes no awq model, its quantization is by 'gptq'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_layers_are_said_so(case, tmp_path):
    change, said, says = DAMAGED[case]
    path = alone(tmp_path / "in", change(layer()[1]), **said)
    for read in (form.qtensors, *(() if form.lacks() else (form.read,))):
        with pytest.raises(FormatError, match=says):
            read(path)


def test_a_scaled_activation_is_refused(tmp_path):
    path = alone(tmp_path / "in", layer()[1])
    found = load_file(path / "model.safetensors") | {"transformer.blocks.0.ffn.act.scales": torch.ones(4)}
    save_file(found, path / "model.safetensors")
    with pytest.raises(FormatError, match="act.scales belongs to no quantized weight; AutoAWQ scales an activation"):
        form.qtensors(path)


def test_damaged_files_are_said_so(tmp_path):
    path = alone(tmp_path / "in", layer()[1])
    whole = (path / "model.safetensors").read_bytes()
    for length in (0, 7, 200, len(whole) - 1):
        (path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(FormatError, match="no whole safetensors file"):
            form.qtensors(path)
    for text in ("{", "[]", "", '{"quantization_config": 3}'):
        (path / "config.json").write_text(text)
        assert not form.holds(path)
        with pytest.raises(FormatError, match="cannot be read|holds a|describes no awq model"):
            form.qtensors(path)
    with pytest.raises(FormatError, match="there is no awq directory"):
        form.qtensors(tmp_path / "none")


# ---- refusals --------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("quant, says", [
    (weight(8), "no integers of 4 bits"), (U4.but(scale=MinMax(zero="offset")), "float offset"), (weight(4, Group(16)), "each 32 inputs one step"),
    (Quant(Uniform(4, None)), "signed=True")])
def test_what_cannot_be_held_is_refused(quant, says):
    with pytest.raises(FormatError, match=f"awq:w4 cannot hold a tensor of .*{says}"):
        form.fit(quant, "w4", (64, 128))


def test_more_refusals():
    assert export.target("awq")[1] == "w4" and form.why_not(U4.but(grid=Uniform(4, False), scale=MinMax(dtype="float16")), "w4", (8, 32)) is None
    with pytest.raises(FormatError, match="no target 'awq:w8'; nearest: awq:w4"):
        form.fit(weight(4), "w8", (64, 128))
    with pytest.raises(FormatError, match="keep_full"):
        form.fit(weight(4), "w4", (64, 128), body=False)
    for entry, module, says in ((scheme("w4a8").input, "Linear", "holds weights alone"), (None, "Conv1D", "this layer is a Conv1D")):
        with pytest.raises(FormatError, match=says):
            form.fit_input(entry, "w4", weight(4), (64, 128), module)
    tensor = form.fit(U4, "w4", (8, 32)).quantize(torch.randn(8, 32))
    tensor.zero[0, 0] = 0
    assert form.why_not(tensor, "w4") is None, "AWQ stores zeros as they are"


def test_what_is_in_the_way_stays(tmp_path):
    made = checkpoint(packed(Rule("*proj", weight=weight(4))))
    form.write(made, tmp_path / "out", "w4")
    with pytest.raises(FormatError, match="exists"):
        form.write(made, tmp_path / "out", "w4")


# ---- proofs ----------------------------------------------------------------------------------------------------------------------------------------

@there
def test_proofs_pass_and_a_flipped_bit_fails_them(tmp_path):
    model = packed(Rule("*proj", weight=U4))
    save(model, tmp_path / "out")
    path = form.write(checkpoint(model), export.place(tmp_path / "out/exports", "awq:w4"), "w4")
    proofs = verify(tmp_path / "out", trained=load_packed(tmp_path / "out"))
    loads = None if isinstance(form.model(path), str) else True
    assert [proof.passed for proof in proofs] == [True, True, True, loads], proofs
    assert "21 tensors (14 quantized)" in proofs[2].result and (loads or "gptqmodel is not installed" in proofs[3].result)
    found = load_file(path / "model.safetensors")
    found[f"{Q}.qzeros"][0, 0] ^= 1
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    assert [proof.passed for proof in verify(tmp_path / "out")] == [True, False]


def test_without_the_packages(tmp_path, monkeypatch):
    monkeypatch.setattr("qatlas.export.awq.readers.find_spec", lambda name: None)
    model = packed(Rule("*proj", weight=weight(4)))
    path = form.write(checkpoint(model), tmp_path / "out", "w4")
    with pytest.raises(FormatError, match=r"pip install 'qatlas\[compressed-tensors\]'"):
        form.read(path)
    assert "gptqmodel" in form.model(path) and same(form.qtensors(path), checkpoint(model).tensors) == []
