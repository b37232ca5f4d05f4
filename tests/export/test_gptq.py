"""GPTQ: bytes by hand, words as AutoGPTQ packs them, public decodes, directories of ours and of others."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_llama import MATRICES, llama

from qatlas import export
from qatlas.core.error import FormatError
from qatlas.core.floats import Float
from qatlas.core.grain import Block, Group, PerChannel, PerTensor, Scattered
from qatlas.core.grid import HalfStep, Sign, Stretched, Ternary, Uniform
from qatlas.core.qtensor import QTensor, Stacked
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, MinMax
from qatlas.core.scheme import scheme, weight
from qatlas.export import Checkpoint
from qatlas.export import gptq as form
from qatlas.export.gptq.layout import KINDS, Parts, restore, store
from qatlas.export.grouped import middle, size
from qatlas.model.pack import checkpoint, load_packed, pack, save
from qatlas.model.roles import Role
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.model.verify import verify

U4 = Quant(Uniform(4, False), Group(32), MinMax())
SIZES = {"hidden_size": 64, "intermediate_size": 128}
Q = "model.layers.0.self_attn.q_proj"
there = pytest.mark.skipif(bool(form.lacks()), reason=str(form.lacks()))


def packed(kind, *rules, **sizes):
    """A packed tiny Llama, trained for the target by nobody."""
    rules = [*rules, *keep_full(Role.EMBEDDING, Role.HEAD)]
    return pack(quantize(llama(**{**SIZES, **sizes}), rules, SimpleNamespace(extra_rules=(), target=f"gptq:{kind}")))


def config(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def same(found, tensors):
    values = {name: t.dequantize() if isinstance(t, QTensor) else t.float() for name, t in found.items()}
    return [name for name, t in tensors.items() if not torch.equal(values[name], t.dequantize() if isinstance(t, QTensor) else t)]


def words(tensor):
    return [f"{word & 0xFFFFFFFF:08x}" for word in tensor.flatten().tolist()]


def ladder(bits=4, zeros=True):
    """8 outputs of 8 inputs: output n has the codes n, n + 1, ..., n + 7, the zero n + 1 and the step (n + 1) / 2."""
    n = torch.arange(8)
    codes, steps = (n[:, None] + n[None]).to(torch.uint8), (n + 1) / 2
    return QTensor(codes, steps, n + 1.0 if zeros else None, None, Uniform(bits, not zeros), PerChannel(), "float16")


# ---- bytes ---------------------------------------------------------------------------------------------------------------------------------------

def test_four_bits_by_hand():
    made = store(ladder(), "w4", -1)
    assert words(made.qweight) == ["76543210", "87654321", "98765432", "a9876543", "ba987654", "cba98765", "dcba9876", "edcba987"]
    assert made.qweight.shape == (1, 8) and words(made.qzeros) == ["76543210"], "v1 stores zeros less one"
    assert words(store(ladder(), "w4_v2", -1).qzeros) == ["87654321"]
    assert made.scales.tolist() == [[0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]] and made.scales.dtype == torch.float16
    assert made.g_idx.tolist() == [0] * 8
    hand = ladder().dequantize()
    assert hand[2].tolist() == [1.5 * (2 + k - 3) for k in range(8)]
    assert torch.equal(restore(made, 4, 1, False, ()).dequantize(), hand)


def test_around_zero_all_zeros_lie_in_the_middle():
    tensor = ladder(zeros=False)
    assert words(store(tensor, "w4", -1).qzeros) == ["77777777"] and words(store(tensor, "w4_v2", -1).qzeros) == ["88888888"]
    back = restore(store(tensor, "w4", -1), 4, 1, False, ())
    assert back.zero is None and back.grid == Uniform(4) and torch.equal(back.codes, tensor.codes)
    wide = Quant(Uniform(8)).quantize(torch.randn(4, 4))
    assert words(store(wide, "w8", -1).qzeros) == ["7f7f7f7f"] and words(store(wide, "w8_v2", -1).qzeros) == ["80808080"]
    two = Quant(Uniform(2)).quantize(torch.randn(16, 16))
    assert words(store(two, "w2", -1).qzeros) == ["55555555"] and words(store(two, "w2_v2", -1).qzeros) == ["aaaaaaaa"]


def test_three_bits_straddle_words_by_hand():
    """0 1 2 3 4 5 6 7 in three bits each are the bytes 88 c6 fa; four times that are three words."""
    codes = (torch.arange(32) % 8).to(torch.uint8).repeat(32, 1)
    tensor = QTensor(codes, torch.ones(32), torch.arange(32) % 7 + 1.0, None, Uniform(3, False), PerChannel(), "float16")
    made = store(tensor, "w3", -1)
    assert words(made.qweight[:, 5]) == ["88fac688", "c688fac6", "fac688fa"] and made.qweight.shape == (3, 32)
    stream = sum((n % 7) << 3 * n for n in range(32))
    assert words(made.qzeros) == [f"{stream >> 32 * i & 0xFFFFFFFF:08x}" for i in range(3)]
    assert torch.equal(restore(made, 3, 1, False, ()).dequantize(), tensor.dequantize())


AUTOGPTQ = {2: ("a78491371197b0cd", "8361ddc46c2ae0a1"), 3: ("d3b0a231e64c55cc", "460b7ea093660f5f"), 4: ("fe3d4915c18b4267", "5514f3e72bca47e5"),
            8: ("d0291965160de705", "5a744995327b4b75")}


@pytest.mark.parametrize("bits", AUTOGPTQ)
def test_words_are_those_of_autogptq(bits):
    """sha256 of what `pack` of AutoGPTQ 0.7.1 (qlinear_cuda.py) made of these codes, zeros and steps."""
    n, k, group = torch.arange(32)[:, None], torch.arange(64)[None], torch.arange(2)[None]
    codes, zeros, steps = (7 * n + 5 * k + n * k) % 2**bits, 1 + (3 * n + group) % (2**bits - 1), (1 + n + group) / 64
    tensor = QTensor(codes.to(torch.uint8), steps, zeros.float(), None, Uniform(bits, False), Group(32), "float16")
    made = store(tensor, f"w{bits}", 32)
    assert tuple(hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16] for t in made[:2]) == AUTOGPTQ[bits]


def test_three_bits_are_the_dense_stream_of_compressed_tensors():
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", reason="needs compressed-tensors")
    tensor = Quant(Uniform(3), Group(32)).quantize(torch.randn(32, 96, generator=torch.Generator().manual_seed(0)))
    made = store(tensor, "w3_v2", 32)
    assert torch.equal(helpers.unpack_from_int32(made.qweight.T.contiguous(), 3, torch.Size((32, 96))).int() + 4, tensor.codes.int())


@pytest.mark.parametrize("quant", [weight(4, Group(32)), U4], ids=["symmetric", "zeros"])
def test_openvino_decodes_four_bits(quant):
    """Its front end takes a GPTQ layer apart by itself (v1, 4 bits); times the identity it says the weight, in fp32."""
    gptq = pytest.importorskip("openvino.frontend.pytorch.gptq", reason="needs openvino")
    tensor = quant.but(scale=quant.scale.but(dtype="float16")).quantize(torch.randn(64, 96, generator=torch.Generator().manual_seed(1)))
    layer = torch.nn.Module()
    for name, part in store(tensor, "w4", 32)._asdict().items():
        layer.register_buffer(name, part)
    layer.QUANT_TYPE, layer.bits, layer.group_size, layer.bias = "triton", 4, 32, None
    gptq.patch_model(torch.nn.Sequential(layer))
    assert torch.equal(layer(torch.eye(96)).T, tensor.dequantize())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.booleans(), st.booleans(), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 2**31))
def test_a_layer_comes_back_as_it_was(bits, second, zeros, outs, groups, whole, seed):
    """Codes, zeros and steps, over bits, formats and shapes; and the field of a code lies where the format says."""
    draw = torch.Generator().manual_seed(seed)
    shape = (32 * outs, 32 * groups)
    codes = torch.randint(0, 2**bits, shape, generator=draw, dtype=torch.uint8)
    places = (shape[0],) if whole else (shape[0], groups)
    zero = torch.randint(0 if second else 1, 2**bits, places, generator=draw).float() if zeros else None
    tensor = QTensor(codes, torch.rand(places, generator=draw).half().float() + 1, zero, None, Uniform(bits, not zeros),
                     PerChannel() if whole else Group(32), "float16")
    tensor.scale = tensor.scale.half().float()
    made = store(tensor, f"w{bits}{'_v2' if second else ''}", -1 if whole else 32)
    back = restore(made, bits, 0 if second else 1, False, ())
    assert torch.equal(back.dequantize(), tensor.dequantize()) and torch.equal(back.codes, codes)
    assert torch.equal(back.steps.flatten(), tensor.steps.flatten())
    at = int(torch.randint(0, shape[1], (), generator=draw))
    column = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(made.qweight[:, 3].tolist()))
    assert column >> at * bits & 2**bits - 1 == int(codes[3, at])


# ---- the whole directory ---------------------------------------------------------------------------------------------------------------------------

CASES = {
    "w4 groups": ("w4", weight(4, Group(32)), (32, True)),
    "w4 channels": ("w4", weight(4), (-1, True)),
    "w4 tensor": ("w4", weight(4, PerTensor()), (-1, True)),
    "w4 tiles": ("w4", Quant(Uniform(4), Block(16, 32), AbsMax()), (32, True)),
    "w4 zeros": ("w4_v2", U4, (32, False)),
    "w4 zeros, v1": ("w4", U4, (32, False)),
    "w4 from zero up": ("w4_v2", Quant(Uniform(4, False), Group(32), AbsMax()), (32, False)),
    "w2 zeros": ("w2_v2", Quant(Uniform(2, False), PerChannel(), MinMax()), (-1, False)),
    "w2 ternary": ("w2", weight(1.58), (-1, True)),
    "w2 signs": ("w2", weight(1), (-1, True)),
    "w3": ("w3", weight(3, Group(64)), (64, True)),
    "w3 zeros": ("w3_v2", Quant(Uniform(3, False), Group(32), MinMax()), (32, False)),
    "w3 half steps": ("w3", Quant(HalfStep(2), Group(32)), (32, True)),
    "w8": ("w8", weight(8, Group(32)), (32, True)),
    "w8 zeros": ("w8_v2", Quant(Uniform(8, False), Group(32), MinMax()), (32, False)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_directory_comes_back_bit_for_bit(case, tmp_path):
    kind, quant, (group, sym) = CASES[case]
    model = packed(kind, Rule("*proj", weight=quant))
    made = checkpoint(model)
    path = form.write(made, tmp_path / "out", kind)
    found = form.qtensors(path)
    assert same(found, made.tensors) == [] and set(found) == set(made.tensors) and form.holds(path)
    assert sum(isinstance(t, QTensor) for t in found.values()) == 14
    said = config(path)
    assert (said["group_size"], said["sym"], said["desc_act"], said["lm_head"]) == (group, sym, False, False)
    assert said["checkpoint_format"] == ("gptq_v2" if kind.endswith("v2") else "gptq") and said["bits"] == KINDS[kind].bits
    assert json.loads((path / "quantize_config.json").read_text()) == said and "dynamic" not in said


@there
@pytest.mark.parametrize("case", CASES)
def test_gptqmodel_and_transformers_read_the_trained_numbers(case, tmp_path):
    kind, quant, _ = CASES[case]
    model = packed(kind, Rule("*proj", weight=quant))
    path = form.write(checkpoint(model), tmp_path / "out", kind)
    found = form.read(path)
    assert same(found, checkpoint(model).tensors) == [] and set(found) == set(checkpoint(model).tensors)
    ids = torch.arange(40).reshape(2, 20)
    assert torch.equal(form.model(path)(ids).logits, model(ids).logits)


PARTIAL = [Rule("*.1.self_attn.o_proj", weight=None), Rule("*down_proj", weight=weight(4)), Rule("*proj", weight=weight(4, Group(32)))]


def test_layers_in_full_precision_are_said_so(tmp_path):
    """And layers of one step a channel take the groups of the others."""
    model = packed("w4", *PARTIAL)
    path = form.write(checkpoint(model), tmp_path / "out", "w4")
    said = config(path)
    assert said["dynamic"] == {r"-:^model\.layers\.1\.self_attn\.o_proj$": {}} and len(said["modules_in_block_to_quantize"][0]) == 13
    assert said["group_size"] == 32 and same(form.qtensors(path), checkpoint(model).tensors) == []


@there
def test_transformers_leaves_them_in_full_precision(tmp_path):
    model = packed("w4", *PARTIAL)
    ids = torch.arange(40).reshape(2, 20)
    assert torch.equal(form.model(form.write(checkpoint(model), tmp_path / "out", "w4"))(ids).logits, model(ids).logits)


def others(kind):
    """Two families: biases; Conv1D, whose weight lies (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                             vocab_size=96, tie_word_embeddings=True))
        torch.nn.init.normal_(model.model.layers[1].self_attn.q_proj.bias)
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64, bos_token_id=0, eos_token_id=0))
    rules = [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*", weight=weight(4, Group(32)))]
    return pack(quantize(model.eval(), rules, SimpleNamespace(extra_rules=(), target="gptq:w4")))


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_other_families(kind, tmp_path):
    model = others(kind)
    path = form.write(checkpoint(model), tmp_path / "out", "w4")
    assert same(form.qtensors(path), checkpoint(model).tensors) == []
    if not form.lacks():
        ids = torch.arange(40).reshape(2, 20)
        assert same(form.read(path), checkpoint(model).tensors) == []
        assert "Conv1D" in form.model(path) if kind == "gpt2" else torch.equal(form.model(path)(ids).logits, model(ids).logits)


# ---- checkpoints of others -------------------------------------------------------------------------------------------------------------------------

def alone(path, parts, **said):
    """A directory with one layer."""
    path.mkdir(exist_ok=True)
    save_file({f"{Q}.{name}": part.contiguous() for name, part in parts.items()}, path / "model.safetensors")
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"} | said
    (path / "config.json").write_text(json.dumps({"quantization_config": said}))
    return path


def layer(bits=4, second=False, seed=0):
    draw = torch.Generator().manual_seed(seed)
    tensor = Quant(Uniform(bits, False), Group(32), MinMax(dtype="float16")).quantize(torch.randn(32, 128, generator=draw))
    tensor.zero.clamp_(min=1)
    return tensor, store(tensor, f"w{bits}{'_v2' if second else ''}", 32)._asdict()


def decoded(parts, bits, first):
    """The decode of AutoGPTQ, written down from its formula: s[g] (u - z[g]), field by field."""
    def field(stream, at):
        return sum((w & 0xFFFFFFFF) << 32 * i for i, w in enumerate(stream)) >> at * bits & 2**bits - 1
    words, zeros, steps, index = (parts[name].tolist() for name in ("qweight", "qzeros", "scales", "g_idx"))
    columns = list(zip(*words, strict=True))
    return torch.tensor([[steps[g][n] * (field(columns[n], k) - field(zeros[g], n) - first) for k, g in enumerate(index)]
                         for n in range(len(columns))])


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_inputs_that_were_sorted_keep_their_groups(bits, second, tmp_path):
    """desc_act: the groups lie anywhere, each as large as the others."""
    _, parts = layer(bits, second)
    parts["g_idx"] = parts["g_idx"][torch.randperm(128, generator=torch.Generator().manual_seed(3))]
    path = alone(tmp_path / "in", parts, bits=bits, desc_act=True, checkpoint_format="gptq_v2" if second else "gptq")
    found = form.qtensors(path)[f"{Q}.weight"]
    assert isinstance(found.grain, Scattered) and found.steps.shape == (32, 4)
    assert torch.equal(found.dequantize(), decoded(parts, bits, 0 if second else 1))
    if not form.lacks():
        assert torch.equal(form.read(path)[f"{Q}.weight"], found.dequantize())
    assert "does not give each 32 inputs one step" in str(form.why_not(found, f"w{bits}_v2"))


def test_old_files_and_shards(tmp_path):
    """quantize_config.json beside a config without a word, no g_idx, another file name; two shards with an index."""
    tensor, parts = layer()
    path = alone(tmp_path / "in", {name: part for name, part in parts.items() if name != "g_idx"})
    (path / "model.safetensors").rename(path / "gptq_model-4bit-32g.safetensors")
    (path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    (path / "config.json").write_text("{}")
    assert form.holds(path) and torch.equal(form.qtensors(path)[f"{Q}.weight"].dequantize(), tensor.dequantize())
    shards = alone(tmp_path / "two", {"qzeros": parts["qzeros"]})
    (shards / "model.safetensors").rename(shards / "b.safetensors")
    save_file({f"{Q}.{name}": part for name, part in parts.items() if name != "qzeros"} | {"n.weight": torch.ones(3)}, shards / "a.safetensors")
    index = {f"{Q}.{name}": "b.safetensors" if name == "qzeros" else "a.safetensors" for name in parts}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    found = form.qtensors(shards)
    assert torch.equal(found[f"{Q}.weight"].dequantize(), tensor.dequantize()) and found["n.weight"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_that_wrapped_around(bits, tmp_path):
    """GPTQModel takes one from whole words, so a zero of 0 borrows from its neighbour; what it wrote is read so, and others are refused."""
    tensor, _ = layer(bits)
    tensor.zero = torch.randint(0, 2**bits, tensor.zero.shape, generator=torch.Generator().manual_seed(2)).float()
    tensor.zero[:, 0] = 0
    parts = store(tensor, f"w{bits}_v2", 32)._asdict()
    if bits == 3:
        parts["qzeros"] = store(QTensor(tensor.codes, tensor.scale, (tensor.zero - 1) % 8, None, tensor.grid, tensor.grain), "w3_v2", 32).qzeros
    else:
        ones = sum(1 << at for at in range(0, 32, bits))
        parts["qzeros"] = torch.tensor([[(w - ones + 2**31) % 2**32 - 2**31 for w in row] for row in parts["qzeros"].tolist()], dtype=torch.int32)
    path = alone(tmp_path / "in", parts, bits=bits, meta={"quantizer": ["gptqmodel:4.0.0"]})
    assert torch.equal(form.qtensors(path)[f"{Q}.weight"].dequantize(), tensor.dequantize())
    if not form.lacks():
        assert torch.equal(form.read(path)[f"{Q}.weight"], tensor.dequantize())
    with pytest.raises(FormatError, match=f"q_proj: .* AutoGPTQ reads as {2**bits} and GPTQModel as 0"):
        form.qtensors(alone(tmp_path / "in", parts, bits=bits, meta={"quantizer": ["auto_gptq:0.7"]}))


def test_layers_of_other_bits_by_dynamic(tmp_path):
    tensor, parts = layer(8)
    path = alone(tmp_path / "in", parts, dynamic={"+:.*q_proj": {"bits": 8}})
    assert torch.equal(form.qtensors(path)[f"{Q}.weight"].dequantize(), tensor.dequantize())
    with pytest.raises(FormatError, match="has 8 bits .* says bits=4"):
        form.qtensors(alone(tmp_path / "in", parts))


def changed(name, change):
    return lambda parts: parts | {name: change(parts[name])}


def bad(index):
    index = index.clone()
    index[5] = 9
    return index


DAMAGED = {
    "no zeros": (lambda parts: {n: t for n, t in parts.items() if n != "qzeros"}, {}, "no qzeros"),
    "a part": (lambda parts: parts | {"perm": torch.zeros(1)}, {}, "perm is a part that GPTQ does not know"),
    "rank": (changed("qweight", torch.flatten), {}, "no I32, I32 and F16 matrices"),
    "type": (changed("qweight", torch.Tensor.short), {}, "qweight is I16"),
    "steps' type": (changed("scales", torch.Tensor.int), {}, "scales I32"),
    "outputs": (changed("qweight", lambda t: t[:, :31]), {}, "not those of one layer"),
    "inputs": (changed("qweight", lambda t: t[:15]), {}, "has 120 inputs"),
    "groups": (changed("scales", lambda t: t[:3]), {}, "not those of one layer"),
    "zeros": (changed("qzeros", lambda t: t[:, :3]), {}, "not those of one layer"),
    "empty": (changed("scales", lambda t: t[:, :0]), {}, "not those of one layer"),
    "nothing": (lambda parts: {"qweight": torch.zeros(0, 10**9, dtype=torch.int32), "qzeros": torch.zeros(4, 0, dtype=torch.int32),
                               "scales": torch.zeros(4, 0, dtype=torch.float16)}, {}, "not those of one layer"),
    "NaN": (changed("scales", lambda t: t * torch.nan), {}, "NaN"),
    "g_idx too long": (changed("g_idx", lambda t: torch.cat([t, t])), {}, "g_idx is I32 .256,., and the layer has 128 inputs"),
    "g_idx beyond": (changed("g_idx", bad), {}, "names the groups 0 ... 9, and there are 4"),
    "g_idx below": (changed("g_idx", lambda t: t - 1), {}, "names the groups -1"),
    "g_idx uneven": (changed("g_idx", lambda t: t.clamp(max=2)), {}, "does not give each of the 4 groups 32"),
    "g_idx never filled": (changed("g_idx", torch.zeros_like), {}, "uneven groups"),
    "other group": (lambda parts: parts, {"group_size": 64}, "config.json says bits=4, group_size=64"),
    "other bits": (lambda parts: parts, {"bits": 8}, "config.json says bits=8"),
    "bits": (lambda parts: parts, {"bits": 5}, "bits=5"),
    "bits as text": (lambda parts: parts, {"bits": "4"}, "bits='4'"),
    "no bits": (lambda parts: parts, {"bits": None}, "bits=None"),
    "group": (lambda parts: parts, {"group_size": 0}, "group_size=0"),
    "layout": (lambda parts: parts, {"checkpoint_format": "marlin"}, "made for one engine"),
    "marlin": (lambda parts: parts, {"is_marlin_format": True}, "made for one engine"),
    "words": (lambda parts: parts, {"pack_dtype": "int64"}, "int32 can be read"),
    "method": (lambda parts: parts, {"quant_method": "awq"}, "describes no gptq model, its quantization is by 'awq'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_layers_are_said_so(case, tmp_path):
    change, said, says = DAMAGED[case]
    path = alone(tmp_path / "in", change(layer()[1]), **said)
    with pytest.raises(FormatError, match=says):
        form.qtensors(path)
    if not form.lacks() and not case.startswith("g_idx") and case != "NaN":
        with pytest.raises(FormatError, match=says):
            form.read(path)


def test_damaged_files_are_said_so(tmp_path):
    path = alone(tmp_path / "in", layer()[1])
    whole, said = (path / "model.safetensors").read_bytes(), (path / "config.json").read_text()
    huge = whole.replace(b'"shape":[16,32]', b'"shape":[99999999999,32]')
    assert huge != whole
    longer = len(huge) - len(whole) + int.from_bytes(whole[:8], "little")
    for raw in (b"", whole[:7], whole[:200], whole[:-1], longer.to_bytes(8, "little") + huge[8:], (2**63).to_bytes(8, "little") + whole[8:]):
        (path / "model.safetensors").write_bytes(raw)
        with pytest.raises(FormatError, match="no whole safetensors file"):
            form.qtensors(path)
    (path / "model.safetensors").write_bytes(whole)
    for text in ("{", "[]", "", "null", '{"quantization_config": 3}', "[" * 100_000):
        (path / "config.json").write_text(text)
        assert not form.holds(path)
        with pytest.raises(FormatError, match="cannot be read|holds a|describes no gptq model"):
            form.qtensors(path)
    (path / "config.json").write_text(said)
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"no")
    with pytest.raises(FormatError, match="pytorch_model.bin: pickle files are never opened"):
        form.qtensors(path)
    assert form.holds(path) and not form.holds(tmp_path / "none") and not form.holds(path / "config.json")
    with pytest.raises(FormatError, match="there is no gptq directory"):
        form.qtensors(tmp_path / "none")


# ---- refusals --------------------------------------------------------------------------------------------------------------------------------------

HELD_NOT = [
    ("w4", weight(8), "no integers of 4 bits"), ("w2", weight(4), "no integers of 2 bits"), ("w4", Quant(Float(2, 1)), "no integers"),
    ("w8", Quant(Stretched(3)), "nor those over a power of two"), ("w8", Quant(Uniform(9)), "no integers of 8 bits"),
    ("w4", Quant(Uniform(4, None)), "signed=True"), ("w4", U4.but(scale=MinMax(zero="offset")), "float offset"),
    ("w4", weight(4, Group(24)), "24 does not divide"), ("w4", weight(4, Group(16)), "each 32 inputs one step"),
    ("w4", Quant(Uniform(4), PerChannel(-1)), "each 32 inputs one step"),
    ("w4", Quant(Uniform(4, False), Group(32)), "zero at code 0.*gptq:w4_v2 holds them"),
    ("w4", weight(4).but(scale=AbsMax(nested=Quant(Uniform(6, False), PerTensor()))), "themselves quantized"),
    ("w4", weight(4).but(scale=AbsMax(dtype="float8_e8m0fnu")), "trained as float8_e8m0fnu"),
]


@pytest.mark.parametrize("target, quant, says", HELD_NOT, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_held_is_refused_with_the_nearest(target, quant, says):
    with pytest.raises(FormatError, match=says) as caught:
        form.fit(quant, target, (64, 128))
    assert f"gptq:{target}" in str(caught.value) and "nearest scheme" in str(caught.value)


def test_more_refusals():
    with pytest.raises(FormatError, match="hold these numbers: gptq:w8, gptq:w8_v2;"):
        form.fit(weight(8), "w4", (64, 128))
    with pytest.raises(FormatError, match="keep_full"):
        form.fit(weight(4), "w4", (64, 128), body=False)
    with pytest.raises(FormatError, match="no target 'gptq:w5'; nearest: gptq:"):
        form.fit(weight(4), "w5", (64, 128))
    with pytest.raises(FormatError, match="nearest: gptq"):
        export.target("gptp:w4")
    assert "no multiple of" in str(form.why_not(TARGETS4, "w4", (40, 128))) and "no multiple of" in str(form.why_not(TARGETS4, "w4", (64, 100)))
    assert "only matrices" in str(form.why_not(TARGETS4, "w4", (64, 128, 3)))
    assert "several parts" in str(form.why_not(Stacked([weight(4).quantize(torch.randn(4, 32))]), "w4", (4, 32)))
    for entry, module, says in ((scheme("w4a8").input, "Linear", "holds weights alone"), (None, "Embedding", "this layer is a Embedding")):
        with pytest.raises(FormatError, match=says):
            form.fit_input(entry, "w4", weight(4), (64, 128), module)


TARGETS4 = form.TARGETS["w4"]


def test_values_of_a_tensor_decide():
    x = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    assert "no fp16 numbers" in str(form.why_not(weight(4).quantize(x), "w4"))
    fine = form.fit(U4, "w4", (32, 128)).quantize(x)
    assert form.why_not(fine, "w4") is None
    fine.zero[3, 1] = 0
    assert "1 of 128 groups have their zero at code 0" in str(form.why_not(fine, "w4")) and form.why_not(fine, "w4_v2") is None
    fine.zero[3, 1] = 1.5
    assert "no integers of 4 bits" in str(form.why_not(fine, "w4_v2"))
    large = Quant(Uniform(8), scale=AbsMax(dtype="float16")).quantize(torch.full((32, 32), 1e5))
    assert "beyond 65504" in str(form.why_not(large, "w8"))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([Uniform(2), Uniform(3), Uniform(4, narrow=True), Uniform(4, False), Uniform(8), Uniform(8, False), Ternary(), Sign(),
                        HalfStep(2), HalfStep(3), Stretched(4), Stretched(2)]),
       st.sampled_from([PerChannel(), PerTensor(), Group(32), Group(96), Group(192), Block(16, 64)]), st.sampled_from([AbsMax(), MinMax()]),
       st.sampled_from(list(KINDS)), st.integers(0, 2**31))
def test_what_fits_is_held_and_comes_back(grid, grain, scale, target, seed):
    """Over grids, grains, scales and targets: a Quant that fits is stored without loss, or its values are refused with their reason."""
    x = torch.randn(32, 192, generator=torch.Generator().manual_seed(seed))
    try:
        moved = form.fit(Quant(grid, grain, scale), target, (32, 192))
    except FormatError:
        return
    tensor = moved.quantize(x)
    if reason := form.why_not(tensor, target):
        assert isinstance(scale, MinMax) and ("zero" in reason)
        return
    bits, group = KINDS[target].bits, size([tensor])
    back = restore(store(tensor, target, group), bits, KINDS[target].first, False, ())
    assert torch.equal(back.dequantize(), tensor.dequantize()) and (back.zero is None) >= middle(tensor, bits)


BROKEN = {
    "class": (lambda made: made.config.update(architectures=["NoSuchModel"]), "knows no NoSuchModel"),
    "missing": (lambda made: made.tensors.pop(f"{Q}.weight"), "missing model.layers.0.self_attn.q_proj.weight"),
    "NaN": (lambda made: made.tensors.update({"lm_head.weight": torch.full((310, 64), torch.nan)}), "NaN"),
    "bits": (lambda made: made.tensors.update({f"{Q}.weight": weight(8).quantize(torch.randn(64, 64))}), "hold .*q_proj.weight, .* no integers of 4"),
    "embedding": (lambda made: made.tensors.update({"model.embed_tokens.weight": weight(4).quantize(torch.randn(310, 64))}), "a Embedding"),
    "head": (lambda made: made.tensors.update({"lm_head.weight": weight(4).quantize(torch.randn(310, 64))}), "outside of the repeated blocks"),
    "input": (lambda made: made.inputs.update({Q: scheme("w4a8").input}), "quantizes its input"),
    "signal": (lambda made: setattr(made, "signals", ("model.layers.0.self_attn:key",)), "quantized signal"),
    "nothing": (lambda made: made.tensors.update({n: t.dequantize() for n, t in made.tensors.items() if isinstance(t, QTensor)}), "no layer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_refusal_leaves_nothing_behind(case, tmp_path):
    spoil, says = BROKEN[case]
    model, half = llama(**SIZES), Quant(Uniform(4), scale=AbsMax(dtype="float16"))
    tensors = {n: half.quantize(t) if n.split(".")[-2] in MATRICES else t for n, t in model.state_dict().items()}
    made = Checkpoint(model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, tensors)
    spoil(made)
    with pytest.raises(FormatError, match=says):
        form.write(made, tmp_path / "out", "w4")
    assert not list(tmp_path.iterdir())


def test_rules_are_refused_before_training_with_their_layer():
    for rules, says in (([Rule("*proj", weight=weight(4), input=scheme("w4a8").input)], "q_proj: gptq holds weights alone"),
                        ([Rule("@head", weight=weight(4))], "lm_head: gptq quantizes the layers of the repeated blocks"),
                        ([Rule("*proj", weight=weight(4, Group(16)))], "q_proj: gptq:w4 cannot hold .*Group"),
                        ([Rule("*proj", weight=weight(4)), Rule("*self_attn:key", signal=scheme("w4a8").input)], "inside attention")):
        with pytest.raises(FormatError, match=says):
            quantize(llama(**SIZES), rules, SimpleNamespace(extra_rules=(), target="gptq:w4"))


# ---- proofs ----------------------------------------------------------------------------------------------------------------------------------------

def test_without_the_package(tmp_path, monkeypatch):
    """Writing needs none, nor has `qtensors`; reading says what is missing, and a proof is not made."""
    monkeypatch.setattr("qatlas.export.gptq.readers.find_spec", lambda name: None)
    model = packed("w4", Rule("*proj", weight=weight(4)))
    save(model, tmp_path / "out")
    path = form.write(checkpoint(model), export.place(tmp_path / "out/exports", "gptq:w4"), "w4")
    with pytest.raises(FormatError, match="pip install gptqmodel"):
        form.read(path)
    assert "gptqmodel" in form.model(path) and same(form.qtensors(path), checkpoint(model).tensors) == []
    assert [proof.passed for proof in verify(tmp_path / "out")] == [True, None]


@there
def test_proofs_pass_and_a_flipped_bit_fails_them(tmp_path):
    model = packed("w4", Rule("*proj", weight=weight(4)))
    save(model, tmp_path / "out")
    path = form.write(checkpoint(model), export.place(tmp_path / "out/exports", "gptq:w4"), "w4")
    proofs = verify(tmp_path / "out", trained=load_packed(tmp_path / "out"))
    assert [proof.passed for proof in proofs] == [True] * 4, proofs
    assert proofs[3].claim == "gptq:w4 computes what the packed model computes" and "21 tensors (14 quantized)" in proofs[2].result
    file = path / "model.safetensors"
    found = load_file(file)
    found[f"{Q}.qweight"][0, 0] ^= 1
    save_file(found, file, metadata={"format": "pt"})
    assert [proof.passed for proof in verify(tmp_path / "out")] == [True, False]


@there
def test_what_transformers_does_not_find_is_said_so(tmp_path):
    path = form.write(checkpoint(packed("w4", Rule("*proj", weight=weight(4)))), tmp_path / "out", "w4")
    found = load_file(path / "model.safetensors")
    del found["model.norm.weight"]
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="does not find model.norm.weight"):
        form.model(path)


def test_parts_are_named_as_in_the_file():
    assert Parts._fields == ("qweight", "qzeros", "scales", "g_idx")
