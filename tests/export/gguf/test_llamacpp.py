"""llama.cpp itself. It rounds the inputs of each product to 8 bits, so quantized weights are compared twice: with our plain logits, loosely, and
with a model whose layers round their inputs as llama.cpp does, closely: then nothing is left but an input on the edge of two codes, now and
then."""

import json

import pytest
import torch
from tiny_llama import MATRICES, TEXT, checkpoint, llama
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from qatlas.core.error import FormatError, RunError
from qatlas.core.scheme import weight
from qatlas.export.gguf import TARGETS, fit, llamacpp, read, types, vocab, write

pytestmark = pytest.mark.skipif(not llamacpp.available(), reason='llama.cpp is not here: pip install "qatlas[llamacpp]"')

ROUNDING = {"q8_0": 32, "q4_0": 32, "tq2_0": 256, "q4_k": 256}
PLAIN = {"f32": 1e-4, **{name: 0.15 for name, quant in TARGETS.items() if quant is not None}}     # seen: 3e-6, 0.04 to 0.1
CLOSE = 1e-5                                                      # seen: 1.3e-6


def rounds_inputs(size):
    """Q8_0: fp16 step max|x| / 127 of 32 neighbours. Q8_K: fp32 step of 256."""
    def hook(module, inputs):
        x = inputs[0].unflatten(-1, (-1, size))
        step = x.abs().amax(-1, keepdim=True) / 127
        codes = (x / step.clamp(min=1e-30)).round()
        return ((codes * (step.half().float() if size == 32 else step)).flatten(-2),)
    return hook


@torch.no_grad()
def compare(model, path, prompts, k=10):
    """-> the largest difference of the top k log-probabilities, how often the first agrees."""
    worst, same = 0.0, 0
    for ids, theirs in zip(prompts, llamacpp.many_logprobs(path, prompts, k), strict=True):
        ours = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)
        worst = max(worst, max(abs(float(ours[i]) - p) for i, p in theirs.items()))
        same += int(ours.argmax()) == next(iter(theirs))
    return worst, same


def asked(target, tmp_path, tokenizer_dir, **changes):
    """A model quantized for the target, its file, and prompts."""
    model = llama(**changes)
    quant = {"f32": None, "q4_0": fit(weight(4), "q4_0", (256, 256))}.get(target, TARGETS[target])
    path = write(checkpoint(model, quant, tokenizer_dir), tmp_path / "m.gguf", target)
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    return model, path, [tokenizer.encode(text).ids for text in TEXT]


@pytest.mark.parametrize("target", PLAIN)
def test_log_probabilities(target, tmp_path, tokenizer_dir):
    model, path, prompts = asked(target, tmp_path, tokenizer_dir)
    worst, same = compare(model, path, prompts)
    print(f"{target}: {worst:.2g}, first agrees {same} of {len(prompts)}")
    assert worst < PLAIN[target] and same >= len(prompts) - (target != "f32")


def test_every_place_of_a_text(tmp_path, tokenizer_dir):
    model, path, prompts = asked("f32", tmp_path, tokenizer_dir)
    found = llamacpp.each_logprob(path, prompts, k=3)
    assert [len(places) for places in found] == [len(ids) - 1 for ids in prompts]
    rare = 0
    for ids, places in zip(prompts, found, strict=True):
        ours = torch.log_softmax(model(torch.tensor([ids])).logits[0].detach().double(), -1)
        for n, said in enumerate(places):
            assert ids[n + 1] in said and len(said) in (3, 4)     # itself, wherever it stands, beside the first three
            rare += len(said) == 4
            assert max(abs(float(ours[n, i]) - p) for i, p in said.items()) < 1e-4
    assert rare


@pytest.mark.parametrize("target", ROUNDING)
def test_what_differs_is_the_rounding_of_inputs(target, tmp_path, tokenizer_dir):
    model, path, prompts = asked(target, tmp_path, tokenizer_dir, num_hidden_layers=1)
    assert compare(model, path, prompts)[0] > 0.005
    for name, layer in model.named_modules():
        if name.split(".")[-1] in MATRICES:
            layer.register_forward_pre_hook(rounds_inputs(ROUNDING[target]))
    worst = sorted(compare(model, path, [ids])[0] for ids in prompts)
    print(f"{target}, inputs rounded by us: {worst}")
    assert worst[len(prompts) // 2] < CLOSE and worst[-1] < 0.04   # one code on an edge, in one prompt, moves all that follows


def test_an_eight_bit_embedding_beside_a_ternary_body(tmp_path, tokenizer_dir):
    model = llama()
    made = checkpoint(model, TARGETS["tq2_0"], tokenizer_dir)
    for name, quant in (("model.embed_tokens.weight", TARGETS["q8_0"]), ("lm_head.weight", TARGETS["q6_k"])):
        made.tensors[name] = quant.quantize(made.tensors[name])
        model.get_parameter(name).data.copy_(made.tensors[name].dequantize())
    path = write(made, tmp_path / "m.gguf", "tq2_0")
    assert types(path) == {"TQ2_0": 14, "F32": 5, "Q8_0": 1, "Q6_K": 1}
    prompts = [Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).encode(text).ids for text in TEXT]
    assert compare(model, path, prompts)[0] < 0.1


def test_without_the_permutation_llama_cpp_computes_something_else(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr("qatlas.export.gguf.llama.permute", lambda rows, heads: rows)
    model = llama()
    path = write(checkpoint(model, None, tokenizer_dir), tmp_path / "m.gguf", "f32")
    assert compare(model, path, [list(range(40, 80))])[0] > 0.01


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
                                  {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                   "original_max_position_embeddings": 64}], ids=["linear", "llama3"])
def test_rotary_scaling(rope, tmp_path, tokenizer_dir):
    model = llama(rope_parameters=rope)
    made = checkpoint(model, None, tokenizer_dir)
    path = write(made, tmp_path / "m.gguf", "f32")
    assert compare(model, path, [list(range(20, 110))])[0] < 1e-4 and read(path).keys() == made.tensors.keys()


def test_without_the_wheel_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(llamacpp, "available", lambda: False)
    with pytest.raises(RunError, match=r"qatlas\[llamacpp\]"):
        llamacpp.tokenize(write(checkpoint(llama(), None), tmp_path / "m.gguf", "f32"), ["a"])


def test_generates_what_our_model_would(tmp_path, tokenizer_dir):
    model = llama(eos_token_id=None)
    path = write(checkpoint(model, None, tokenizer_dir), tmp_path / "m.gguf", "f32")
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    ids = tokenizer.encode("the cat").ids
    start = len(ids)
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1, :300].argmax()))
    said, ours = llamacpp.generate(path, "the cat", 12), tokenizer.decode(ids[start:])
    assert said.rstrip("\ufffd") and ours.startswith(said.rstrip("\ufffd")[:4])


def byte_level(folder, parts, ignore_merges):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXT * 10, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
                                                                 initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def smollm(folder):
    return byte_level(folder, [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], False)


def llama3(folder):
    split = pre_tokenizers.Split(Regex(vocab.LLAMA3), "isolated")
    return byte_level(folder, [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)], True)


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "sentencepiece"])
def test_tokenizers_agree(kind, tmp_path, tokenizer_dir, sentences_dir):
    folder = {"gpt-2": tokenizer_dir, "sentencepiece": sentences_dir}.get(kind) or {"smollm": smollm, "llama-bpe": llama3}[kind](tmp_path)
    path = write(checkpoint(llama(vocab_size=320), None, folder), tmp_path / "m.gguf", "f32")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [*TEXT, "1234567 numbers 89", "UPPER's  don't\n\n\n  spaces   end ", "日本語 🙂", " starts with a space"]
    assert llamacpp.tokenize(path, texts) == [tokenizer.encode(text).ids for text in texts]
    assert len(llamacpp.next_logprobs(path, TEXT[0], 5)) == 5


def test_what_llama_cpp_will_not_take_is_an_error_here(tmp_path, tokenizer_dir):
    path = write(checkpoint(llama(), None), tmp_path / "none.gguf", "f32")
    with pytest.raises(FormatError, match="no vocabulary"):
        llamacpp.generate(path, "a")
    spoiled = write(checkpoint(llama(), None, tokenizer_dir), tmp_path / "m.gguf", "f32")
    spoiled.write_bytes(spoiled.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    with pytest.raises(FormatError, match=r"(?s)did not take.*attn_q"):
        llamacpp.generate(spoiled, "a")
