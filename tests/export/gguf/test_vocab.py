import json

import pytest
import tiny_models
from tiny_llama import checkpoint, llama, sentencepiece_like

from qatlas.core.error import FormatError
from qatlas.export import Checkpoint
from qatlas.export.gguf import vocab


def spoiled(folder, tmp_path, change, config=None):
    data = json.loads((folder / "tokenizer.json").read_text())
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    said = json.loads((folder / "tokenizer_config.json").read_text()) if config is None else config
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    made = checkpoint(llama(vocab_size=330), None, tmp_path)
    made.config.update(bos_token_id=None, eos_token_id=None)
    return vocab.vocabulary(made)


def nothing(data):
    pass


def test_byte_level(tokenizer_dir, tmp_path):
    keys = spoiled(tokenizer_dir, tmp_path, nothing)
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"], keys["tokenizer.ggml.eos_token_id"]) == ("gpt2", "gpt-2", 0)
    kinds = keys["tokenizer.ggml.token_type"]
    assert kinds[0] == vocab.CONTROL and set(kinds[1:300]) == {vocab.NORMAL} and set(kinds[300:]) == {vocab.UNUSED} and len(kinds) == 330
    assert keys["tokenizer.ggml.tokens"][329] == "[PAD329]" and keys["tokenizer.ggml.add_bos_token"] is False and keys["tokenizer.ggml.merges"]


def test_sentencepiece_like(sentences_dir, tmp_path):
    keys = spoiled(sentences_dir, tmp_path, nothing)
    tokens, kinds, scores = (keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores"))
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_bos_token"] is True and keys["tokenizer.ggml.add_space_prefix"] is True
    assert kinds[:4] == [vocab.UNKNOWN, vocab.CONTROL, vocab.CONTROL, vocab.BYTE] and kinds.count(vocab.BYTE) == 256
    assert scores[tokens.index("th")] == 0.0 > scores[tokens.index("▁th")] > scores[tokens.index("▁the")]
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.unknown_token_id"]) == (1, 2, 0)


BYTES = {
    "unigram": (lambda data: data["model"].update(type="Unigram"), "BPE"),
    "normalizer": (lambda data: data.update(normalizer={"type": "NFC"}), "NFC"),
    "prefix space": (lambda data: data["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space"),
    "words cut elsewhere": (lambda data: data.update(pre_tokenizer={"type": "Whitespace"}), "gpt-2, smollm, llama-bpe"),
    "no words": (lambda data: data["pre_tokenizer"].update(use_regex=False), "no name that we know"),
    "whole words first": (lambda data: data["model"].update(ignore_merges=True), "ignore_merges=True"),
    "suffix": (lambda data: data["model"].update(end_of_word_suffix="</w>"), "suffixes"),
    "too many": (lambda data: data["added_tokens"].append({"id": 400, "content": "<far>", "special": True}), "330 rows"),
}


@pytest.mark.parametrize("case", BYTES)
def test_byte_level_refusals(case, tokenizer_dir, tmp_path):
    change, says = BYTES[case]
    with pytest.raises(FormatError, match=says):
        spoiled(tokenizer_dir, tmp_path, change)


def test_an_end_is_needed(tokenizer_dir, tmp_path):
    with pytest.raises(FormatError, match="eos_token"):
        spoiled(tokenizer_dir, tmp_path, nothing, config={})


def drop_merge(data):
    data["model"]["merges"].remove(["▁", "th"])


def scatter(data):
    data["model"]["merges"].append(data["model"]["merges"].pop(3))


CHARACTERS = {
    "a way to cut that is no merge": (drop_merge, "not to be merged"),
    "scattered merges": (scatter, "do not stand together"),
    "lower case": (lambda data: data["normalizer"]["normalizers"].append({"type": "Lowercase"}), "something else"),
    "bytes": (lambda data: data["model"]["vocab"].pop("<0x41>"), "256 pieces"),
    "frame": (lambda data: data["post_processor"]["single"].append({"SpecialToken": {"id": "<s>", "type_id": 0}}), "frames every text"),
}


@pytest.mark.parametrize("case", CHARACTERS)
def test_sentencepiece_refusals(case, tmp_path):
    change, says = CHARACTERS[case]
    (tmp_path / "from").mkdir()
    with pytest.raises(FormatError, match=says):
        spoiled(sentencepiece_like(tmp_path / "from"), tmp_path, change)


def test_no_files(tmp_path):
    with pytest.raises(FormatError, match=r"no tokenizer\.json"):
        vocab.vocabulary(checkpoint(llama(), None, tmp_path))


def spoiled_bert(tmp_path, change, config=None):
    folder = tiny_models.bert(tmp_path)
    data = json.loads((folder / "tokenizer.json").read_text())
    change(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return vocab.vocabulary(Checkpoint({"model_type": "bert", "vocab_size": 110}, {}, folder))


def test_word_pieces(tmp_path):
    keys = spoiled_bert(tmp_path, nothing)
    tokens = keys["tokenizer.ggml.tokens"]
    assert tokens[:6] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁a"] and "ing" in tokens and "▁the" in tokens and len(tokens) == 110
    wanted = {"model": "bert", "cls_token_id": 2, "bos_token_id": 2, "seperator_token_id": 3, "eos_token_id": 3, "unknown_token_id": 1,
              "mask_token_id": 4, "padding_token_id": 0, "normalizer.lowercase": True, "normalizer.strip_accents": True, "add_sep_token": False}
    assert {key: keys[f"tokenizer.ggml.{key}"] for key in wanted} == wanted


WORDS = {
    "kind": (lambda data: data["model"].update(type="BPE"), "takes WordPiece tokenizers"),
    "cleaning": (lambda data: data["normalizer"].update(handle_chinese_chars=False), "Chinese"),
    "prefix": (lambda data: data["model"].update(continuing_subword_prefix="@@"), "##"),
    "cutting": (lambda data: data.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    "frame": (lambda data: data["post_processor"]["single"].pop(), "frames every text"),
}


@pytest.mark.parametrize("case", WORDS)
def test_word_piece_refusals(case, tmp_path):
    change, says = WORDS[case]
    with pytest.raises(FormatError, match=says):
        spoiled_bert(tmp_path, change)


def test_word_pieces_need_a_token_for_the_unknown(tmp_path):
    with pytest.raises(FormatError, match="unk_token"):
        spoiled_bert(tmp_path, nothing, {"cls_token": "[CLS]"})


def test_a_chat_template_travels(tmp_path):
    made = checkpoint(llama(), None, tiny_models.qwen2(tmp_path))
    keys = vocab.vocabulary(made)
    assert keys["tokenizer.chat_template"] == "{{ messages[0].content }}" and keys["tokenizer.ggml.pre"] == "qwen2"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    assert vocab.vocabulary(made)["tokenizer.chat_template"] == "{{ bos_token }}"


def test_gemmas_runs_of_spaces_keep_their_order(tmp_path):
    made = checkpoint(llama(vocab_size=330), None, tiny_models.gemma(tmp_path))
    keys = vocab.vocabulary(made)
    tokens, kinds, scores = (keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores"))
    two, three = tokens.index("▁▁"), tokens.index("▁▁▁")
    assert kinds[two] == kinds[three] == vocab.USER and scores[two] > scores[three] > scores[tokens.index("th")]
    assert keys["tokenizer.ggml.add_space_prefix"] is False
