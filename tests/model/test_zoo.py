"""The zoo: what is in the package loads without a network, says what SOURCES.md says, and repeats."""

import importlib
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from qatlas.model import zoo
from qatlas.model.zoo.gpt import DIRECTORY

SPLITS = ["train", "heldout"]
PHRASES = [" indented\n\n    twice,\ttabs", "it's 3.14159 == x[1:-1]  # done", "naïve café — 東京 🙂", "trailing space ", "\n", "   "]


@pytest.fixture(scope="module")
def speaker():
    return zoo.gpt()


def paragraphs(text: str) -> set[str]:
    return {" ".join(p.split()) for p in re.split(r"\n{2,}|<\|endoftext\|>", text)}


# ---- the language model ---------------------------------------------------------------------------------------------------------------------


def test_the_shipped_model_is_small_trained_and_ready(speaker):
    model, _ = speaker
    assert 3e6 < model.num_parameters() < 4e6
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(file.stat().st_size for file in DIRECTORY.iterdir()) < 9e6


def test_every_linear_has_whole_blocks_of_256(speaker):
    widths = {name: module.in_features for name, module in speaker[0].named_modules() if isinstance(module, nn.Linear)}
    assert len(widths) == 4 * 7 + 1
    assert not {name: width for name, width in widths.items() if width % 256}


def test_loading_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    zoo.gpt(), zoo.vit(), zoo.resnet()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("phrase", PHRASES)
def test_the_tokenizer_is_its_file_and_loses_nothing(speaker, phrase):
    _, tokenizer = speaker
    ids = tokenizer(phrase).input_ids
    assert ids == Tokenizer.from_file(str(DIRECTORY / "tokenizer.json")).encode(phrase).ids      # no class of transformers has its own idea of it
    assert tokenizer.decode(ids) == phrase


def test_one_special_token(speaker):
    _, tokenizer = speaker
    assert len(tokenizer) == 1024
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer("<|endoftext|>").input_ids[0] == 0


def test_perplexity_is_what_sources_says(speaker):
    model, tokenizer = speaker
    said = re.search(r"\| held out, beginning \| ([\d,]+) \| ([\d.]+) \|", (DIRECTORY / "SOURCES.md").read_text())
    tokens, nats = int(said[1].replace(",", "")), float(said[2])
    ids = torch.tensor(tokenizer.backend_tokenizer.encode(zoo.text("heldout")).ids[:tokens])
    rows = ids.unfold(0, 513, 512)                                # (16, 513)
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits                       # (16, 512, 1024)
    here = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert here == pytest.approx(nats, abs=2e-3)
    assert math.exp(here) < 25                                    # and it knows something: 1,024 would be nothing


def test_it_goes_on_in_words(speaker):
    model, tokenizer = speaker
    ids = tokenizer("<|endoftext|>Return a", return_tensors="pt").input_ids
    spoken = tokenizer.decode(model.generate(ids, max_new_tokens=40, do_sample=False)[0], skip_special_tokens=True)
    known = set(re.findall(r"[a-z]+", zoo.text("train").lower()))
    words = re.findall(r"[a-z]+", spoken.lower())[:-1]            # the last may be cut
    assert len(words) > 5 and sum(word in known for word in words) > 0.8 * len(words)


# ---- its texts ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_a_text_is_whole_documents(split):
    text = zoo.text(split)
    assert text.startswith("<|endoftext|>") and text.endswith("\n<|endoftext|>")
    assert all(len(document) > 80 for document in text.split("<|endoftext|>")[1:-1])


def test_nothing_long_was_both_trained_on_and_held_out():
    shared = paragraphs(zoo.text("train")) & paragraphs(zoo.text("heldout"))
    assert not [p for p in shared if len(p) >= 60]


def test_another_name_and_another_text_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='no text named "test"; there are .train., .heldout.'):
        zoo.text("test")
    shutil.copy(DIRECTORY / "SOURCES.md", tmp_path)
    shutil.copy(DIRECTORY / "heldout.txt.xz", tmp_path / "train.txt.xz")
    monkeypatch.setattr(importlib.import_module("qatlas.model.zoo.gpt"), "DIRECTORY", tmp_path)      # zoo.gpt is the function
    with pytest.raises(ValueError, match="train.txt.xz holds another text"):
        zoo.text("train")


# ---- images ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "least", "most"), [(zoo.vit, 0.9e6, 1.1e6), (zoo.resnet, 0.25e6, 0.4e6)])
def test_image_models(build, least, most):
    model = build(classes=7, seed=3)
    assert least < model.num_parameters() < most
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert model(images).logits.shape == (2, 7)
    again, other = build(classes=7, seed=3).state_dict(), build(classes=7, seed=4).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, other[name]) for name, value in model.state_dict().items())
    assert all(module.in_features % 64 == 0 for module in model.modules() if isinstance(module, nn.Linear))


@pytest.mark.parametrize("build", [zoo.vit, zoo.resnet])
def test_image_models_come_back_from_a_directory(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    again, images = type(model).from_pretrained(tmp_path), torch.ones(1, 3, 32, 32)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(images).logits, again(images).logits, rtol=0, atol=1e-5)       # what the configuration cannot say is lost


def test_an_image_that_patches_do_not_tile_is_refused():
    with pytest.raises(ValueError, match="use a multiple of 4"):
        zoo.vit(image=30)
    assert zoo.vit(image=28)(torch.zeros(1, 3, 28, 28)).logits.shape == (1, 10)
