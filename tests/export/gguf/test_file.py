import gguf
import pytest
import torch
from tiny_llama import MATRICES, checkpoint, llama

from qatlas.core.error import FormatError
from qatlas.core.grain import Group, PerChannel, PerTensor
from qatlas.core.grid import HalfStep, Sign, Ternary, Uniform
from qatlas.core.qtensor import QTensor
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax, AbsMean, MinMax
from qatlas.core.scheme import weight
from qatlas.export.gguf import TARGETS, fit, plan, read, types, write
from qatlas.export.gguf import llama as names

QUANTS = {
    "q8_0": ("q8_0", TARGETS["q8_0"]),
    "q4_0": ("q4_0", TARGETS["q4_0"]),
    "tq2_0": ("tq2_0", TARGETS["tq2_0"]),
    **{name: (name, quant) for name, quant in TARGETS.items() if name not in ("q8_0", "q4_0", "tq2_0") and quant is not None},
    "ternary per channel": ("tq2_0", fit(weight(1.58), "tq2_0", (256, 256))),
    "ternary per tensor": ("tq2_0", Quant(Ternary(), PerTensor(), AbsMean(dtype="float16"))),
    "ternary per channel in q4_0": ("q4_0", fit(weight(1.58), "q4_0", (256, 256))),
    "half steps in q4_0": ("q4_0", fit(Quant(HalfStep(2), PerChannel(), AbsMean()), "q4_0", (256, 256))),
    "int4 groups of 64, signed steps": ("q4_0", Quant(Uniform(4), Group(64), AbsMax(dtype="float16", sign="free"))),
    "affine in f32": ("f32", Quant(Uniform(3, False), Group(64), MinMax(zero="offset"))),
    "ternary in bf16": ("bf16", Quant(Ternary(), PerChannel(), AbsMean(dtype="bfloat16"))),
    "half steps a channel in q2_k": ("q2_k", fit(Quant(HalfStep(2), PerChannel(), AbsMean()), "q2_k", (256, 256))),
    "an integer zero in q5_0": ("q5_0", fit(Quant(Uniform(4, False), Group(32), MinMax()), "q5_0", (256, 256))),
    "ternary in f16": ("f16", Quant(Ternary(), PerChannel(), AbsMean(dtype="float16"))),
    "plain": ("f32", None),
}


def values(tensor):
    return tensor.dequantize() if isinstance(tensor, QTensor) else tensor


def rounded(model):
    """Embeddings and head as fp16 and bf16 hold them."""
    for part in (model.model.embed_tokens, model.lm_head):
        part.weight.data = part.weight.data.bfloat16().half().float()
    return model


@pytest.mark.parametrize("case, tied", [*((case, False) for case in QUANTS), ("q4_0", True), ("q4_k", True)])
def test_readers_give_back_the_trained_weights(case, tied, tmp_path):
    target, quant = QUANTS[case]
    made = checkpoint(rounded(llama(tied)), quant)
    back = read(write(made, tmp_path / "m.gguf", target))
    assert back.keys() == made.tensors.keys()
    for name, tensor in made.tensors.items():
        assert torch.equal(back[name], values(tensor)), name
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("case", [*(name for name, quant in TARGETS.items() if quant), "half steps in q4_0", "affine in f32", "ternary in f16"])
def test_transformers_computes_the_same_logits(case, tmp_path, tokenizer_dir):
    from transformers import AutoModelForCausalLM

    target, quant = QUANTS[case]
    model = rounded(llama(head_dim=128))
    write(checkpoint(model, quant, tokenizer_dir), tmp_path / "m.gguf", target)
    ids = torch.arange(40).reshape(2, 20)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert torch.equal(theirs(ids).logits, model(ids).logits)


@pytest.mark.parametrize("broken", ["permute", "unpermute"])
def test_without_the_permutation_the_weights_are_others(broken, tmp_path, monkeypatch):
    monkeypatch.setattr(names, broken, lambda rows, heads: rows)
    made = checkpoint(llama(), TARGETS["q4_0"])
    back = read(write(made, tmp_path / "m.gguf", "q4_0"))
    wrong = {name.split(".")[-2] for name, tensor in made.tensors.items() if not torch.equal(back[name], values(tensor))}
    assert wrong == {"q_proj", "k_proj"}


def test_the_plan_says_what_each_tensor_becomes(tmp_path):
    made = checkpoint(llama(), TARGETS["tq2_0"])
    made.tensors["lm_head.weight"] = made.tensors["lm_head.weight"].half()
    said = plan(made, "tq2_0")
    assert said["token_embd.weight"] == "F32" and said["output.weight"] == "F16" and said["blk.0.attn_norm.weight"] == "F32"
    reader = gguf.GGUFReader(write(made, tmp_path / "m.gguf", "tq2_0"))
    assert {tensor.name: tensor.tensor_type.name for tensor in reader.tensors} == said
    assert sum(kind == "TQ2_0" for kind in said.values()) == 2 * len(MATRICES)


def test_header(tmp_path):
    reader = gguf.GGUFReader(write(checkpoint(llama(), None), tmp_path / "m.gguf", "f32"))
    said = {key: found.contents() for key, found in reader.fields.items()}
    wanted = {"general.architecture": "llama", "general.name": "tiny", "general.file_type": 0, "general.quantization_version": 2,
              "llama.vocab_size": 310, "llama.context_length": 128, "llama.embedding_length": 256, "llama.feed_forward_length": 512,
              "llama.block_count": 2, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 64,
              "llama.rope.freq_base": 10000.0, "tokenizer.ggml.model": "none"}
    assert {key: said[key] for key in wanted} == wanted


def test_biases_travel(tmp_path):
    made = checkpoint(llama(attention_bias=True, mlp_bias=True), TARGETS["q8_0"])
    for name, tensor in made.tensors.items():
        if name.endswith("bias"):
            made.tensors[name] = torch.randn_like(tensor)
    back = read(write(made, tmp_path / "m.gguf", "q8_0"))
    assert all(torch.equal(back[name], values(tensor)) for name, tensor in made.tensors.items())


def test_quantized_embeddings_and_a_tied_head(tmp_path):
    made = checkpoint(llama(tied=True), TARGETS["q8_0"])
    made.tensors["model.embed_tokens.weight"] = TARGETS["q8_0"].quantize(made.tensors["model.embed_tokens.weight"])
    made.tensors["lm_head.weight"] = made.tensors["model.embed_tokens.weight"]
    back = read(write(made, tmp_path / "m.gguf", "q8_0"))
    assert "lm_head.weight" not in back and torch.equal(back["model.embed_tokens.weight"], values(made.tensors["lm_head.weight"]))


EIGHT = Quant(Uniform(8), Group(32), AbsMax(dtype="float16"))


@pytest.mark.parametrize("target, quant, kinds", [
    (EIGHT, EIGHT, ("Q8_0", "Q8_0")), (EIGHT, TARGETS["q4_k"], ("Q8_0", "Q4_K")),
    (TARGETS["tq1_0"], TARGETS["q5_1"], ("TQ2_0", "Q5_1")),       # the target, though a smaller type would do
    (Quant(Uniform(8), Group(32)), Quant(Sign(), PerChannel(), AbsMean(dtype="bfloat16")), ("F32", "TQ2_0")),
    (Quant(Uniform(4), Group(16), AbsMax(dtype="float16")), Quant(Ternary(), Group(8), AbsMean(dtype="bfloat16")), ("F32", "F16"))])
def test_embeddings_and_head_take_what_holds_them(target, quant, kinds, tmp_path):
    made = checkpoint(llama(), TARGETS["tq2_0"])
    for name, other in (("model.embed_tokens.weight", target), ("lm_head.weight", quant)):
        made.tensors[name] = other.quantize(made.tensors[name])
    said = plan(made, "tq2_0")
    assert (said["token_embd.weight"], said["output.weight"]) == kinds and said["blk.0.attn_q.weight"] == "TQ2_0"
    path = write(made, tmp_path / "m.gguf", "tq2_0")
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert found == said and types(path) == {kind: list(said.values()).count(kind) for kind in types(path)}
    back = read(path)
    assert all(torch.equal(back[name], values(tensor)) for name, tensor in made.tensors.items())


def test_plain_tensors_of_a_bf16_model_stay_so(tmp_path):
    made = checkpoint(llama(), TARGETS["q8_0"])
    made.tensors["lm_head.weight"] = made.tensors["lm_head.weight"].bfloat16() * 2.0**-12
    assert plan(made, "q8_0")["output.weight"] == "BF16" and plan(made, "f32")["output.weight"] == "F32"
    back = read(write(made, tmp_path / "m.gguf", "q8_0"))
    assert torch.equal(back["lm_head.weight"], made.tensors["lm_head.weight"].float())


def without(made, name):
    del made.tensors[name]


def extra(made):
    made.tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(64)


HALF = AbsMax(dtype="float16")
Q = "model.layers.0.self_attn.q_proj.weight"
BROKEN = {
    "other architecture": (lambda made: made.config.update(model_type="gpt2"), "'gpt2'; it knows llama"),
    "other activation": (lambda made: made.config.update(hidden_act="gelu"), "silu"),
    "rotary scaling": (lambda made: made.config.update(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "yarn"),
    "missing": (lambda made: without(made, Q), "missing blk.0.attn_q.weight"),
    "missing head": (lambda made: without(made, "lm_head.weight"), "missing output.weight"),
    "extra": (extra, "q_norm"),
    "vocabulary": (lambda made: made.config.update(vocab_size=300), "310 rows"),
    "config": (lambda made: made.config.pop("rms_norm_eps"), "rms_norm_eps"),
    "NaN": (lambda made: made.tensors.update({"lm_head.weight": torch.full((310, 256), torch.nan)}), "NaN"),
    "fp32 step": (lambda made: made.tensors.update({Q: Quant(Uniform(4), Group(32)).quantize(torch.randn(256, 256))}), "no fp16 numbers"),
    "group": (lambda made: made.tensors.update({Q: Quant(Uniform(4), Group(16), HALF).quantize(torch.randn(256, 256))}), "multiple of 32"),
    "offset": (lambda made: made.tensors.update({Q: Quant(Uniform(4), Group(32), MinMax(zero="offset")).quantize(torch.randn(256, 256))}), "offset"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_refusal_leaves_nothing_behind(case, tmp_path):
    spoil, says = BROKEN[case]
    made = checkpoint(llama(), TARGETS["q4_0"])
    spoil(made)
    with pytest.raises(FormatError, match=says):
        write(made, tmp_path / "m.gguf", "q4_0")
    assert not list(tmp_path.iterdir())


def test_unknown_target(tmp_path):
    with pytest.raises(FormatError, match="nearest: gguf:q4_"):
        write(checkpoint(llama(), None), tmp_path / "m.gguf", "q4_2")


@pytest.mark.parametrize("target", ["f16", "bf16"])
def test_dense_halves_do_not_round(target, tmp_path):
    with pytest.raises(FormatError, match="16 would round"):
        write(checkpoint(llama(), None), tmp_path / "m.gguf", target)


def test_a_file_in_the_way_stays(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_text("mine")
    with pytest.raises(FormatError, match="exists"):
        write(checkpoint(llama(), None), path, "f32")
    assert path.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_truncated_file_is_said_so(tmp_path):
    whole = write(checkpoint(llama(), TARGETS["q8_0"]), tmp_path / "m.gguf", "q8_0").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 8, 20, 24, *range(50, 3000, 173), len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"cut\.gguf"):
            read(cut)


def test_foreign_files(tmp_path):
    with pytest.raises(FormatError, match="no GGUF file"):
        read(tmp_path / "none.gguf")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(FormatError, match="another kind"):
        read(other)
    writer = gguf.GGUFWriter(other, "mamba")
    writer.add_tensor("token_embd.weight", torch.zeros(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match="mamba"):
        read(other)
