import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripts import script

from qatlas.export import Checkpoint
from qatlas.export.gguf import TARGETS, llamacpp, read, write

DATA = Path(os.environ.get("QATLAS_DATA", "none"))
pytestmark = pytest.mark.skipif(not (DATA / "ckpt" / "stories260k").is_dir(), reason="QATLAS_DATA has no ckpt/stories260k")


@pytest.fixture(scope="module")
def stories():
    return script("stories260k")


@pytest.fixture(scope="module")
def folder(stories, tmp_path_factory):
    return stories.prepare(DATA / "ckpt" / "stories260k", tmp_path_factory.mktemp("stories"))


@pytest.fixture(scope="module")
def text():
    return (DATA / "text" / "tinystories_5stories.txt").read_text(encoding="utf-8")


def test_perplexity(stories, folder, text):
    found, count = stories.perplexity(folder, text)
    assert count == 1804 and found == pytest.approx(3.55, abs=0.005)


def test_text_there_and_back(folder, text):
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)
    for story in (part.strip() for part in text.split("<|endoftext|>") if part.strip()):
        ids = tokens(story)["input_ids"]
        assert ids[0] == 1 and tokens.decode(ids, skip_special_tokens=True) == story


@pytest.mark.skipif(not llamacpp.available(), reason='llama.cpp is not here: pip install "qatlas[llamacpp]"')
@pytest.mark.parametrize("target, bound", [("f32", 1e-4), ("q8_0", 0.4), ("q4_0", 0.4)])
def test_llama_cpp_reads_and_tells_it(folder, text, tmp_path, target, bound):
    import json

    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder).eval()
    quant = TARGETS[target]
    # The 172 inputs of down_proj are no multiple of 32: it stays plain.
    ours = tuple(f"{part}_proj.weight" for part in ("q", "k", "v", "o", "gate", "up"))
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: quant.quantize(weight) if quant and name.endswith(ours) else weight for name, weight in tensors.items()}
    path = write(Checkpoint(json.loads((folder / "config.json").read_text()), tensors, folder), tmp_path / "m.gguf", target)
    back = read(path)
    model.load_state_dict(back, strict=False)
    assert all(torch.equal(back[name], t if isinstance(t, torch.Tensor) else t.dequantize()) for name, t in tensors.items() if name in back)
    tokens = AutoTokenizer.from_pretrained(folder)
    story = [part.strip() for part in text.split("<|endoftext|>") if part.strip()]
    assert llamacpp.tokenize(path, story) == [tokens(part)["input_ids"] for part in story]
    prompts = [tokens(part)["input_ids"][: 20 + 30 * i] for i, part in enumerate(story)]
    worst, same = 0.0, 0
    for ids, theirs in zip(prompts, llamacpp.many_logprobs(path, prompts), strict=True):
        with torch.no_grad():
            ours = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)
        worst = max(worst, max(abs(float(ours[i]) - p) for i, p in theirs.items()))
        same += int(ours.argmax()) == next(iter(theirs))
    said = llamacpp.generate(path, "Once upon a time", 30)
    print(f"{target}: {worst:.2g}, first agrees {same} of {len(prompts)}: {said!r}")
    assert worst < bound and same >= 4
    with torch.no_grad():
        ids = model.generate(torch.tensor([tokens("Once upon a time")["input_ids"]]), max_new_tokens=30, do_sample=False)
    assert target != "f32" or tokens.decode(ids[0], skip_special_tokens=True) == "Once upon a time" + said
