"""llama.cpp about the other architectures: what it computes with their files, and how it cuts text. The tolerance is that of the Llama files; Gemma
and BERT have 1e-3 more, since llama.cpp looks gelu up in a table of fp16 numbers."""

import pytest
import torch
from tiny_llama import TEXT
from tiny_models import OWN, TOKENIZERS, bert, checkpoint, model
from tokenizers import Tokenizer

from qatlas.core.error import FormatError
from qatlas.export.gguf import TARGETS, engine, llamacpp, write

pytestmark = pytest.mark.skipif(not llamacpp.available(), reason='llama.cpp is not here: pip install "qatlas[llamacpp]"')

TEXTS = [*TEXT, "1234567 numbers 89", "UPPER's  don't\n\n\n  spaces   end ", "日本語 🙂", " starts with a space"]
PROMPTS = [list(range(20)), list(range(40, 105))]                 # longer than any window here


def close(name, target):
    """Seen: 4e-6 and 1e-3; 0.06 with inputs of 8 bits."""
    return 0.15 if target != "f32" else 4e-3 if name.startswith(("gemma", "bert")) else 1e-4


@pytest.mark.parametrize("name, target", [*((name, "f32") for name in OWN if "bert" not in name), ("qwen2", "iq4_nl"), ("gemma2", "q4_0")])
def test_log_probabilities(name, target, tmp_path, tokenizer_dir):
    ours = model(name)
    found = engine(write(checkpoint(ours, TARGETS[target], tokenizer_dir), tmp_path / "m.gguf", target), PROMPTS)
    worst = 0.0
    for prompt, top in zip(PROMPTS, found, strict=True):
        wanted = torch.log_softmax(ours(torch.tensor([prompt])).logits[0, -1].double(), -1)
        worst = max(worst, max(abs(float(wanted[i]) - value) for i, value in top.items()))
        assert target != "f32" or int(wanted.argmax()) == next(iter(top))
    print(f"{name} {target}: {worst:.2g}")
    assert worst < close(name, target)


@torch.no_grad()
def test_vectors_of_an_encoder(tmp_path):
    ours = model("bert")
    path = write(checkpoint(ours, TARGETS["q8_0"], bert(tmp_path)), tmp_path / "m.gguf", "q8_0")
    wanted = [ours(torch.tensor([prompt])).last_hidden_state[0] for prompt in PROMPTS]
    for pooling, pooled in (("", lambda t: t), ("mean", lambda t: t.mean(0, keepdim=True)), ("cls", lambda t: t[:1])):
        found = llamacpp.vectors(path, PROMPTS, pooling)
        assert all(torch.allclose(torch.tensor(theirs), pooled(t), atol=0.08) for theirs, t in zip(found, wanted, strict=True)), pooling
    assert "no classifier" in engine(path, PROMPTS)
    with pytest.raises(FormatError, match="no classifier"):
        llamacpp.scores(path, PROMPTS)


@torch.no_grad()
def test_class_scores(tmp_path):
    ours = model("bert classifier")
    path = write(checkpoint(ours, None, bert(tmp_path)), tmp_path / "m.gguf", "f32")
    wanted = torch.cat([ours(torch.tensor([prompt])).logits for prompt in PROMPTS])
    assert torch.allclose(torch.tensor(llamacpp.scores(path, PROMPTS)), wanted, atol=4e-3)
    tops = engine(path, PROMPTS)
    assert [max(top, key=top.get) for top in tops] == wanted.argmax(-1).tolist() and all(top.keys() == {0, 1, 2} for top in tops)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_agree(kind, tmp_path):
    folder = TOKENIZERS[kind](tmp_path / "tokenizer")
    name = kind.partition(",")[0]
    ours = model({"tekken": "mistral", "gemma": "gemma2"}.get(name, name), vocab_size=330)
    path = write(checkpoint(ours, None, folder), tmp_path / "m.gguf", "f32")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert llamacpp.tokenize(path, TEXTS) == [tokenizer.encode(text).ids for text in TEXTS]
