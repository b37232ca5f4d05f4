"""Models that others have quantized: read, run, trained on in three ways, written again; and what a paper makes of them."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from by_package import PACK, THEIRS, args, directory, file
from safetensors.torch import load_file, save_file
from tiny_llama import checkpoint as quantized
from tiny_llama import llama

from qatlas.core.error import CheckpointError, FormatError, QuantError
from qatlas.core.qtensor import QTensor
from qatlas.core.scheme import weight
from qatlas.export import compressed_tensors, holder
from qatlas.export import gguf as gguf_format
from qatlas.layers.adapter import Lora
from qatlas.layers.linear import QLinear
from qatlas.layers.packed import Packed, PackedEmbedding, PackedLinear
from qatlas.model.foreign import load, told, whole
from qatlas.model.further import adapt, unpack
from qatlas.model.load import load as load_any
from qatlas.model.load import start
from qatlas.model.pack import checkpoint, load_packed, pack, save
from qatlas.model.rules import Rule, quantize
from qatlas.train import data
from qatlas.train.fit import fit
from qatlas.train.optim import AdamW
from qatlas.train.run import Run
from qatlas.train.task import LanguageModelling

there = pytest.mark.skipif(bool(compressed_tensors.lacks()), reason="needs compressed-tensors")
IDS = torch.arange(40).reshape(2, 20)
BLOCKS = [name for name, quant in gguf_format.TARGETS.items() if quant is not None]
SMALL = {"num_hidden_layers": 1}


def task():
    text = "abcdefghijklmnop" * 40
    return LanguageModelling(data.Text(text, text), lambda t: [ord(c) - 97 for c in t], length=16, batch=4, run=Run(None, progress=False))


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def scales(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("scale")}


def blocks(path):
    return {t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


def same(one, other):
    """Whether two files hold the same tensors, byte for byte."""
    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    return first.keys() == second.keys() and all(t.dtype == second[name].dtype and torch.equal(t, second[name]) for name, t in first.items())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """case -> a path: made once."""
    folder, made = tmp_path_factory.mktemp("theirs"), {}

    def get(case):
        if case not in made:
            at = folder / case.replace(" ", "-").replace(",", "")
            if case.startswith("gguf "):
                at.mkdir()
                made[case] = file(at / "model.gguf", llama(**SMALL, tied=False), case.removeprefix("gguf "))
            else:
                made[case] = directory(at, THEIRS[case], **SMALL)
        return made[case]

    return get


CASES = [*(pytest.param(case, marks=there) for case in THEIRS), *(f"gguf {name.upper()}" for name in BLOCKS)]


# ---- as the file says ------------------------------------------------------------------------------------------------------------------------------

@there
@pytest.mark.parametrize("case", ["4 bits, groups, symmetric", "4 bits, groups, zeros", "w8a8", "w8a8, one step", "w8a8, zeros", "fp8"])
def test_a_directory_computes_what_transformers_computes(case, files, tmp_path):
    # beside zeros transformers multiplies in the type in which the steps lie, which in bf16 rounds the weights
    path = directory(tmp_path / "fp32", THEIRS[case], dtype=torch.float32, **SMALL) if case == "4 bits, groups, zeros" else files(case)
    assert torch.equal(logits(load(path)), logits(compressed_tensors.model(path)))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "TQ2_0"])
def test_a_gguf_file_computes_what_transformers_computes(kind, tmp_path):
    path = file(tmp_path / "model.gguf", llama(**SMALL), kind, keys={"general.name": "tiny", "tokenizer.ggml.model": "none"}.items())
    assert torch.equal(logits(load(path))[:1, -1], gguf_format.logits(path, [IDS[0].tolist()]))


def test_a_tied_table_in_blocks_serves_head_and_embedding(tmp_path):
    made = quantized(llama(tied=True, **SMALL), gguf_format.TARGETS["q4_0"])
    table = gguf_format.TARGETS["q8_0"].quantize(made.tensors["model.embed_tokens.weight"])
    made.tensors["model.embed_tokens.weight"] = table
    path = gguf_format.write(made, tmp_path / "m.gguf", "q4_0")
    model = load(path)
    assert isinstance(model.model.embed_tokens, PackedEmbedding) and isinstance(model.lm_head, PackedLinear)
    assert model.lm_head.store is model.model.embed_tokens.store
    before = logits(model)
    again = logits(load_packed(save(model, tmp_path / "packed")))
    assert torch.equal(before, again) and torch.equal(before, logits(whole(path)))
    unpack(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(logits(model), before)
    assert model.lm_head.weight_quantizer is model.model.embed_tokens.weight_quantizer
    fit(model, task(), optimizer=AdamW(lr=1e-3, scale_share=0.01), steps=2)
    assert torch.equal(logits(model), logits(pack(model)))


# ---- trained on ------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", CASES)
def test_masters_start_at_the_codes(case, files):
    packed = load(files(case))
    before, first = logits(packed), checkpoint(packed).tensors
    model = unpack(load(files(case)))
    assert isinstance(model.model.layers[0].mlp.up_proj, QLinear)
    assert torch.equal(logits(model), before)
    again = checkpoint(model).tensors
    for name, q in first.items():
        if not isinstance(q, QTensor):
            continue
        assert torch.equal(q.dequantize(), again[name].dequantize()), name
        assert type(q.scale) is type(again[name].scale) and q.grid == again[name].grid and q.grain == again[name].grain, name
        alive = q.grain.view(torch.ones(q.shape)) * q.steps.unsqueeze(-1) != 0
        moved = (q.values() != again[name].values()) & q.grain.back(alive, q.shape)
        assert not moved.any(), name


@pytest.mark.parametrize("case", [pytest.param("4 bits, groups, zeros", marks=there), pytest.param("w8a8, one step", marks=there),
                                  pytest.param("nvfp4", marks=there), "gguf Q4_0", "gguf Q4_K", "gguf Q6_K", "gguf MXFP4"])
def test_steps_alone_masters_and_adapters_learn(case, files):
    model = load(files(case))
    codes, before = {n: b.clone() for n, b in model.named_buffers() if n.endswith("codes")}, scales(model)
    history = fit(model, task(), train="*.scale", optimizer=AdamW(scale_share=0.3 if "MX" in case else 0.03), steps=3)
    assert history.loss[-1] < history.loss[0] and all(torch.equal(b, codes[n]) for n, b in model.named_buffers() if n in codes)
    assert any(not torch.equal(p, before[name]) for name, p in scales(model).items())
    assert torch.equal(logits(model), logits(model))

    model = unpack(load(files(case)))
    history = fit(model, task(), optimizer=AdamW(lr=1e-3, scale_share=0.01), steps=3)
    assert history.loss[-1] < history.loss[0] and torch.equal(logits(model), logits(pack(model)))

    model = adapt(load(files(case)), Lora(4, place="beside"))
    before = logits(model)
    assert torch.equal(before, logits(load(files(case))))
    history = fit(model, task(), train="*.adapter.*", optimizer=AdamW(lr=1e-2), steps=3)
    assert history.loss[-1] < history.loss[0]


@pytest.mark.parametrize("how", ["packed", "trainable"])
@pytest.mark.parametrize("case", [pytest.param("4 bits, groups, zeros", marks=there), "gguf Q4_K"])
def test_what_was_trained_is_saved_and_loaded(how, case, files, tmp_path):
    model = load(files(case)) if how == "packed" else unpack(load(files(case)))
    fit(model, task(), train="*.scale", optimizer=AdamW(scale_share=0.03), steps=2)
    if how == "packed":
        again = load_packed(save(model, tmp_path / "out"))
    else:
        model.save_pretrained(tmp_path / "out")
        again = load_any(tmp_path / "out")[0]
    assert torch.equal(logits(model), logits(again))


# ---- written again ---------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", BLOCKS)
def test_a_gguf_file_is_written_again_byte_for_byte(kind, tmp_path):
    path = gguf_format.write(quantized(llama(**SMALL), gguf_format.TARGETS[kind]), tmp_path / "m.gguf", kind)
    again = gguf_format.write(checkpoint(load(path)), tmp_path / "again.gguf", kind)
    masters = gguf_format.write(checkpoint(unpack(load(path))), tmp_path / "masters.gguf", kind)
    assert blocks(path) == blocks(again) == blocks(masters)


@there
@pytest.mark.parametrize("kind", ["w4a16", "w8a8", "fp8_dynamic", "mxfp4a16", "nvfp4a16"])
def test_a_directory_is_written_again_tensor_for_tensor(kind, tmp_path):
    own = compressed_tensors.TARGETS[kind]
    made = quantized(llama(**SMALL), own)
    entry = compressed_tensors.fitting.KINDS[kind].input
    made.inputs = {n.removesuffix(".weight"): entry for n, t in made.tensors.items() if isinstance(t, QTensor) and entry is not None}
    made.config["architectures"] = ["LlamaForCausalLM"]
    path = compressed_tensors.write(made, tmp_path / "out", kind)
    for model, name in ((load(path), "again"), (unpack(load(path)), "masters")):
        again = compressed_tensors.write(checkpoint(model), tmp_path / name, kind)
        assert same(path, again)
        first, second = (json.loads((at / "config.json").read_text())["quantization_config"] for at in (path, again))
        assert first == second


def test_trained_steps_are_those_that_the_file_can_hold(tmp_path):
    path = file(tmp_path / "m.gguf", llama(**SMALL), "Q4_K")
    model = load(path)
    fit(model, task(), train="*.scale", optimizer=AdamW(scale_share=0.03), steps=2)
    again = gguf_format.write(checkpoint(model), tmp_path / "again.gguf", "q4_k")
    assert torch.equal(logits(load(again)), logits(model)) and blocks(again) != blocks(path)


# ---- as a start in full precision ------------------------------------------------------------------------------------------------------------------

def test_a_paper_starts_from_the_dequantized_weights_and_says_so(files):
    path = files("gguf Q4_0")
    model, tokenizer = start(path)
    assert type(model.lm_head) is torch.nn.Linear and tokenizer is None and torch.equal(logits(model), logits(load(path)))
    assert "dequantized weights" in told(path) and str(path) in told(path) and told("zoo:gpt") is None
    assert isinstance(load_any(path)[0].model.layers[0].mlp.up_proj, PackedLinear) and holder(path) == "gguf"


# ---- what is wrong ---------------------------------------------------------------------------------------------------------------------------------

def test_an_unknown_method_names_what_is_read(tmp_path):
    llama(**SMALL).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(CheckpointError, match=r"by 'bitsandbytes', which qatlas does not read; it reads .*compressed-tensors.*gguf"):
        load_any(tmp_path)
    with pytest.raises(CheckpointError, match="of no format"):
        load(tmp_path)


def test_files_and_changes_that_make_no_model(files, tmp_path):
    path = files("gguf Q4_0")
    with pytest.raises(CheckpointError, match="cannot be changed by num_hidden_layers"):
        load_any(path, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match="or the GGUF file itself"):
        load_any(path.parent)
    (tmp_path / "note.txt").write_text("nothing")
    with pytest.raises(CheckpointError, match="is a file"):
        load_any(tmp_path / "note.txt")


@there
def test_tensors_that_are_not_those_of_the_model(tmp_path):
    path = directory(tmp_path / "a", [(PACK, args(strategy="channel"), None, ["Linear"])], **SMALL)
    tensors = load_file(path / "model.safetensors")
    without = {name: t for name, t in tensors.items() if name != "model.norm.weight"}
    save_file({**without, "model.other.weight": torch.ones(4)}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"(?s)1 missing: model.norm.weight.*1 superfluous: model.other.weight"):
        load(path)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysModel"]}))
    with pytest.raises((CheckpointError, FormatError), match="NobodysModel"):
        load(path)


@pytest.mark.parametrize("name", ["gpt2", "vit", "resnet", "bert"])
def test_our_own_packed_models_unpack_too(name, tiny):
    model = pack(quantize(tiny.models[name]().eval(), [Rule("*", weight=weight(4), optional=True)]))
    before = tiny.answer(model, name)
    unpack(model)
    assert not any(isinstance(m, Packed) for m in model.modules()) and torch.equal(tiny.answer(model, name), before)
    assert torch.equal(tiny.answer(pack(model), name), before)


def test_further_needs_what_it_needs(files):
    model = load(files("gguf Q4_0"))
    with pytest.raises(QuantError, match="before the quantizer"):
        adapt(model, Lora(4, place="inside"))
    adapt(model, Lora(4, place="after"))
    with pytest.raises(QuantError, match="has an adapter already"):
        adapt(model, Lora(4, place="after"))
    with pytest.raises(QuantError, match="has adapter, whose master"):
        unpack(model)
    with pytest.raises(QuantError, match="no packed layer"):
        unpack(llama(**SMALL))
