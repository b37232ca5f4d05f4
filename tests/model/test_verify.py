"""Proofs: they pass for what was written, and fail for one bit that is not."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from qatlas.core.codebook import IQ4_NL
from qatlas.core.error import CheckpointError, FormatError
from qatlas.core.grain import Group
from qatlas.core.quantizer import Quant
from qatlas.export import target
from qatlas.model import proof as proving
from qatlas.model import verify as module
from qatlas.model.pack import checkpoint, pack, save
from qatlas.model.roles import Role
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.model.verify import exports, verify

EXPORT = Path(__file__).parents[1] / "export"                      # its small models


@pytest.fixture(scope="module")
def written(tmp_path_factory, llama_dir):
    """A packed Llama with an export, as a run would leave it; not trained."""
    from qatlas.model.load import load

    out = tmp_path_factory.mktemp("verify") / "out"
    model, tokenizer = load(llama_dir)
    quantize(model, "w4a8-g32", SimpleNamespace(extra_rules=(), target="gguf:q4_0"))
    save(pack(model), out, tokenizer)
    target("gguf:q4_0")[0].write(checkpoint(model, out, "tiny"), out / "exports/gguf-q4_0/model.gguf", "q4_0")
    return out


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(bytes(raw))


def test_exports_are_found_by_their_folder(written, tmp_path):
    assert exports(written) == {"gguf:q4_0": written / "exports/gguf-q4_0/model.gguf"}
    assert exports(tmp_path) == {}


def test_every_proof_passes_for_what_was_written(written):
    proofs = verify(written, sums={"config.json": module._sum(written / "config.json")})
    assert [proof.reader for proof in proofs] == ["sha256 in record.json", "transformers from_pretrained", "the format's public reader",
                                                  "transformers, gguf_file", "llama.cpp (xllamacpp)"]
    assert all(proof.passed for proof in proofs[:4]), proofs
    assert proofs[4].passed is (True if find_spec("xllamacpp") else None), proofs[4]
    assert "21 tensors (14 quantized)" in proofs[2].result and "8 bits" in proofs[4].tolerance


def test_input_quantizers_are_on_again_afterwards(written):
    """The file holds no input quantizers, so its logits are compared without; the model itself is compared with them."""
    from qatlas.model.pack import load_packed

    model = load_packed(written)
    ids = module._questions(model, ())
    on = proving.answered(model, ids)
    with proving._inputs_off(model):
        off = proving.answered(model, ids)
    assert not torch.equal(on, off) and torch.equal(on, proving.answered(model, ids))


def test_prompts_of_ones_own(written, monkeypatch):
    monkeypatch.setattr("qatlas.export.gguf.readers.available", lambda: False)
    proofs = verify(written, prompts=[[1, 2, 3], [4, 5]])
    assert "logits of 2 prompts equal" in proofs[0].result
    assert proofs[-1].passed is None and "qatlas[llamacpp]" in proofs[-1].result


@pytest.mark.parametrize("at", [-1, 0, 8])
def test_a_flipped_bit_in_the_export(copied, at):
    flip(copied / "exports/gguf-q4_0/model.gguf", at)
    proofs = verify(copied)
    assert [proof.passed for proof in proofs] == [True, False], "later proofs would say nothing new"
    assert proofs[1].claim == "gguf:q4_0 holds the trained weights"


def test_a_flipped_bit_in_the_weights(copied):
    sums = {"model.safetensors": module._sum(copied / "model.safetensors")}
    flip(copied / "model.safetensors", -1)
    proofs = verify(copied, sums=sums)
    assert proofs[0].passed is False and "model.safetensors" in proofs[0].result
    assert [proof.passed for proof in proofs[1:]] == [True, False]


def test_a_file_that_is_gone(copied):
    (copied / "model.safetensors").unlink()
    proofs = verify(copied, sums={"model.safetensors": "0"})
    assert [proof.passed for proof in proofs] == [False, False]
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        verify(copied)


def test_an_engine_that_disagrees_and_one_that_refuses(written, monkeypatch):
    from qatlas.model.pack import load_packed

    model = load_packed(written)
    ids = module._questions(model, ())
    told = [{int(token): 0.0 for token in range(3)} for _ in ids]
    assert proving._engine(model, "gguf:q4_0", written, lambda path, prompts: told, ids).passed is False

    def refuse(path, prompts):
        raise FormatError("llama.cpp did not take it")

    proof = proving._engine(model, "gguf:q4_0", written, refuse, ids)
    assert proof.passed is False and "did not take it" in proof.result


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "resnet"])
def test_other_families_are_asked_in_their_own_way(tiny, tmp_path, name):
    save(pack(tiny.made(name)), tmp_path / "out")
    proofs = verify(tmp_path / "out")
    assert [proof.passed for proof in proofs] == [True]


def test_what_is_not_there(written, tmp_path):
    with pytest.raises(FormatError, match="holds no export 'gguf:q8_0'; it holds gguf:q4_0"):
        verify(written, "gguf:q8_0")
    with pytest.raises(CheckpointError):
        verify(tmp_path)


def test_the_saved_directory_is_compared_with_the_model_that_was_trained(copied):
    """Two loads of one file are always equal; only the model in memory knows what was trained."""
    from qatlas.model.pack import load_packed

    model = load_packed(copied)
    assert [proof.passed for proof in verify(copied, trained=model)[:3]] == [True, True, True]
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.store.scale.mul_(1.5)
    proofs = verify(copied, trained=model)
    assert proofs[0].claim == "the saved directory computes what the trained model computes" and proofs[0].passed is False
    assert proofs[1].passed is True and proofs[2].passed is False


def test_quantizers_of_outputs_and_of_layers_in_full_precision_are_off_too(tiny):
    from qatlas.core.scheme import scheme
    from qatlas.model.rules import Rule

    a8, w4 = scheme("w4a8").input, scheme("w4").weight
    model = pack(quantize(tiny.models["llama"](tie=False), [Rule("*q_proj", weight=w4, output=a8), Rule("lm_head", input=a8)]))
    with proving._inputs_off(model):
        assert not model.lm_head.input_quantizer.on and not model.model.layers[0].self_attn.q_proj.output_quantizer.on
    assert model.lm_head.input_quantizer.on


@pytest.mark.parametrize("kind", ["gemma2 other", "bert classifier"])
def test_proofs_of_other_architectures(kind, tmp_path, monkeypatch):
    """Gemma's norms lie in the file as 1 + w; a classifier answers with classes. What transformers cannot read is said, not failed."""
    monkeypatch.syspath_prepend(str(EXPORT))
    import tiny_models

    home = tmp_path / "out"
    gemma = kind.startswith("gemma")
    folder = tiny_models.TOKENIZERS["gemma" if gemma else "bert"](tmp_path / "t")
    says = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"} if gemma else {"unk_token": "[UNK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **says)
    model = tiny_models.model(kind, vocab_size=330)
    rules = [*keep_full(Role.EMBEDDING, Role.HEAD, Role.CLASSIFIER), Rule(Role.LINEAR, weight=Quant(IQ4_NL, Group(32)))]
    quantize(model, rules, SimpleNamespace(extra_rules=(), target="gguf:iq4_nl"))
    save(pack(model), home, tokenizer)
    target("gguf:iq4_nl")[0].write(checkpoint(model, home, "tiny"), home / "exports/gguf-iq4_nl/model.gguf", "iq4_nl")
    proofs = {proof.reader: proof for proof in verify(home)}
    assert proofs["the format's public reader"].passed and "IQ4_NL" in proofs["the format's public reader"].result
    assert proofs["transformers, gguf_file"].passed is None and "transformers" in proofs["transformers, gguf_file"].result
    assert proofs["llama.cpp (xllamacpp)"].passed is (True if find_spec("xllamacpp") else None), proofs["llama.cpp (xllamacpp)"]
