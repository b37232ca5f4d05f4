"""The tokenizer in the header of a GGUF file. llama.cpp brings its own tokenizers; the header says which one and gives it the pieces.

    tokenizer.json                               tokenizer.ggml.model    what is written besides the pieces and their kinds
    BPE over bytes (GPT-2, Llama 3, SmolLM,      gpt2                    merges in order; `pre`, the name of the regular expression that cuts words
      Qwen, Mistral's tekken)
    BPE over characters with byte fallback       llama                   one score a piece; no merges
      (sentencepiece: Llama 1 and 2, Gemma)
    WordPiece (BERT)                             bert                    pieces with U+2581 where a word begins and no ## where it goes on; whether
                                                                         letters are made small and lose their accents
    none                                         none                    llama.cpp loads the weights and can do nothing with text

llama.cpp knows each word-cutting expression by a name, so only those of the table PRE are expressible; another is refused, since a model whose
words are cut elsewhere than in training is a worse model that nobody notices.

The "llama" tokenizer has no list of merges: it joins the neighbours whose joined piece has the highest score, if it is a piece at all. That is the
same as BPE with merges in ranks when every way to cut a piece into two pieces is a merge, and all merges of one piece stand together; then the
score is minus the rank. Vocabularies that come from sentencepiece are so; those that are not are refused.

Two things that llama.cpp does not do, and that are let through: Qwen's tokenizer first composes its text (NFC), which changes only text with
letters and accents apart; and WordPiece takes a word of more than 100 characters as unknown. A chat template travels along as it is.

Source: llama-vocab.cpp and convert_hf_to_gguf.py of llama.cpp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...core.error import FormatError
from ..checkpoint import Checkpoint

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
          r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PRE = {                                                            # what cuts the text -> llama.cpp's name, and whether whole words skip the merges
    (("ByteLevel", True),): ("gpt-2", False),
    (("Digits", True), ("ByteLevel", True)): ("smollm", False),
    (("Split", LLAMA3), ("ByteLevel", False)): ("llama-bpe", True),
    (("Split", QWEN2), ("ByteLevel", False)): ("qwen2", False),
    (("Split", TEKKEN), ("ByteLevel", False)): ("tekken", True),
}
COMPOSED = ("qwen2",)                                             # those that may have the normalizer NFC


def vocabulary(checkpoint: Checkpoint) -> dict[str, Any]:
    """The tokenizer.* keys. Ids come from tokenizer_config.json, or else from the config.

    Raises:
        FormatError: a tokenizer that llama.cpp cannot be told, with what stands in the way.
    """
    if checkpoint.tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    folder = Path(checkpoint.tokenizer)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FormatError(f"there is no tokenizer.json in {folder}; save it with tokenizer.save_pretrained, or give no tokenizer")
    data = json.loads(file.read_text(encoding="utf-8"))
    model = data.get("model") or {}
    kind, wanted = checkpoint.config.get("model_type"), "WordPiece" if checkpoint.config.get("model_type") == "bert" else "BPE"
    if model.get("type") != wanted:
        raise FormatError(f"{file}: GGUF's {kind} takes {wanted} tokenizers, this one is {model.get('type')!r}")
    rows = checkpoint.config["vocab_size"]
    names, kinds = pieces(data, rows)
    if wanted == "WordPiece":
        return {**_words(data, file, names, kinds), **_frame_of_words(folder, names, file)}
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise FormatError(f"{file}: llama.cpp has no BPE with dropout or with word prefixes and suffixes")
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model.get("merges", [])]
    if model.get("byte_fallback"):
        keys = _characters(data, file, names, kinds, merges)
    else:
        keys = _bytes(data, file, names, kinds, merges)
    return {**keys, **special(checkpoint, folder, names, file, needs_end=not model.get("byte_fallback")), **_template(folder)}


def pieces(data: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """All pieces by id and their kinds; rows of the embeddings without a piece are called [PAD<id>] and never used."""
    byid = {i: (piece, NORMAL) for piece, i in data["model"]["vocab"].items()}
    for added in data.get("added_tokens") or []:
        byid[added["id"]] = (added["content"], CONTROL if added.get("special") else USER)
    if byid and max(byid) >= rows:
        raise FormatError(f"the tokenizer has ids up to {max(byid)}, the embeddings only {rows} rows")
    whole = [byid.get(i, (f"[PAD{i}]", UNUSED)) for i in range(rows)]
    return [piece for piece, _ in whole], [kind for _, kind in whole]


def _bytes(data: dict[str, Any], file: Path, names: list[str], kinds: list[int], merges: list[tuple[str, ...]]) -> dict[str, Any]:
    """The "gpt2" model."""
    parts = data.get("pre_tokenizer") or {"type": "none"}
    parts = parts["pretokenizers"] if parts["type"] == "Sequence" else [parts]
    known = PRE.get(tuple((part["type"], _cut(part)) for part in parts))
    if known is None or known[1] != bool(data["model"].get("ignore_merges")):
        cuts = ", ".join(f"{part['type']}({_cut(part)})" for part in parts)
        raise FormatError(f"{file}: llama.cpp has no name that we know for the pre-tokenizer {cuts} with ignore_merges="
                          f"{bool(data['model'].get('ignore_merges'))}; known are those of {', '.join(name for name, _ in PRE.values())}")
    norm = (data.get("normalizer") or {}).get("type")
    if norm is not None and (norm != "NFC" or known[0] not in COMPOSED):
        raise FormatError(f"{file}: llama.cpp's byte-level BPE has no normalizer, this tokenizer has {norm}")
    if any(part.get("add_prefix_space") for part in parts):
        raise FormatError(f"{file}: llama.cpp's byte-level BPE adds no space before the text; set add_prefix_space=False")
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": known[0], "tokenizer.ggml.tokens": names, "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in merges]}


def _cut(part: dict[str, Any]) -> Any:
    """What distinguishes a pre-tokenizer of one type from another."""
    pattern = (part.get("pattern") or {}).get("Regex")
    return {"ByteLevel": part.get("use_regex", True), "Digits": part.get("individual_digits"), "Split": pattern}.get(part["type"])


def _characters(data: dict[str, Any], file: Path, names: list[str], kinds: list[int], merges: list[tuple[str, ...]]) -> dict[str, Any]:
    """The "llama" model."""
    space = _space_prefix(data)
    if space is None:
        raise FormatError(f"{file}: llama.cpp's sentencepiece tokenizer writes a space as U+2581, with or without one before the text, and does "
                          "nothing else to it; this normalizer and pre-tokenizer do something else")
    best: dict[str, int] = {}
    last: str | None = None
    for rank, pair in enumerate(merges):
        piece = "".join(pair)
        if piece != last and piece in best:
            raise FormatError(f"{file}: the merges of {piece!r} do not stand together, so no score says their order")
        best.setdefault(piece, rank)
        last = piece
    vocab, ways = data["model"]["vocab"], set(merges)
    for piece in vocab:
        for i in range(1, len(piece)):
            if piece[:i] in vocab and piece[i:] in vocab and (piece[:i], piece[i:]) not in ways and not piece.startswith("<"):
                raise FormatError(f"{file}: {piece[:i]!r} and {piece[i:]!r} are pieces, and so is {piece!r}, but they are not to be merged; "
                                  "llama.cpp's sentencepiece tokenizer would merge them")
    unknown = data["model"].get("unk_token")
    kinds = [UNKNOWN if name == unknown else BYTE if _is_byte(name) and kind == NORMAL else kind for name, kind in zip(names, kinds, strict=True)]
    if kinds.count(BYTE) != 256:
        raise FormatError(f"{file}: byte fallback needs the 256 pieces <0x00> .. <0xFF>, this vocabulary has {kinds.count(BYTE)}")
    scores = [-float(best.get(name, len(merges))) if kind == NORMAL or name in best else 0.0 for name, kind in zip(names, kinds, strict=True)]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": names, "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.add_space_prefix": space}


def _space_prefix(data: dict[str, Any]) -> bool | None:
    """Whether a space is put before the text; None for what cannot be expressed. Old files say it in the normalizer, new ones as Metaspace."""
    norm, pre = data.get("normalizer"), data.get("pre_tokenizer")
    steps = [] if norm is None else norm["normalizers"] if norm["type"] == "Sequence" else [norm]
    replace = [step for step in steps if step["type"] == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == "▁"]
    prepend = [step for step in steps if step["type"] == "Prepend" and step.get("prepend") == "▁"]
    if pre is not None and pre["type"] == "Split" and pre.get("pattern") == {"String": " "} and replace:
        pre = None                                                # Gemma's: it cuts at spaces, and the normalizer has left none
    if pre is None and len(replace) == 1 and len(replace) + len(prepend) == len(steps) and steps[-1] is replace[0]:
        return bool(prepend)
    if not steps and pre is not None and pre["type"] == "Metaspace" and pre.get("replacement") == "▁" and not pre.get("split", True):
        return {"first": True, "always": True, "never": False}.get(pre.get("prepend_scheme"))
    return None


def _words(data: dict[str, Any], file: Path, names: list[str], kinds: list[int]) -> dict[str, Any]:
    """The "bert" model."""
    norm, pre, model = data.get("normalizer") or {}, data.get("pre_tokenizer") or {}, data["model"]
    if norm.get("type") != "BertNormalizer" or pre.get("type") != "BertPreTokenizer":
        raise FormatError(f"{file}: llama.cpp's WordPiece cuts and cleans text as BERT does (BertNormalizer, BertPreTokenizer); this tokenizer has "
                          f"{norm.get('type')}, {pre.get('type')}")
    if not (norm.get("clean_text", True) and norm.get("handle_chinese_chars", True)) or model.get("continuing_subword_prefix", "##") != "##":
        raise FormatError(f"{file}: llama.cpp's WordPiece cleans text, cuts Chinese characters apart and marks the rest of a word by ##; this "
                          "tokenizer says otherwise")
    small, bare = bool(norm.get("lowercase")), norm.get("strip_accents")
    tokens = [name if kind != NORMAL else name[2:] if name.startswith("##") else "▁" + name for name, kind in zip(names, kinds, strict=True)]
    return {"tokenizer.ggml.model": "bert", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.normalizer.lowercase": small, "tokenizer.ggml.normalizer.strip_accents": small if bare is None else bool(bare)}


def _frame_of_words(folder: Path, names: list[str], file: Path) -> dict[str, Any]:
    """The special tokens of BERT: the one in front (cls) and the one behind (sep) are bos and eos to llama.cpp."""
    from tokenizers import Tokenizer

    frame = Tokenizer.from_file(str(file)).encode("").ids
    if len(frame) != 2:
        raise FormatError(f"{file}: the tokenizer frames every text with the ids {frame}; GGUF's bert has one token before it and one behind")
    says = _says(folder)
    ids = {"bos": frame[0], "cls": frame[0], "eos": frame[1], "seperator": frame[1],       # llama.cpp's spelling
           **{word: _id(role, says, {}, names) for role, word in (("unk", "unknown"), ("pad", "padding"), ("mask", "mask"))}}
    if ids["unknown"] is None:
        raise FormatError(f"{file}: llama.cpp's WordPiece needs to know the token of unknown words; name it as unk_token in tokenizer_config.json")
    keys = {f"tokenizer.ggml.{word}_token_id": number for word, number in ids.items() if number is not None}
    return {**keys, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.add_sep_token": False}


def _template(folder: Path) -> dict[str, Any]:
    """The chat template, if there is one."""
    file, said = folder / "chat_template.jinja", _says(folder).get("chat_template")
    text = file.read_text(encoding="utf-8") if file.is_file() else said
    return {"tokenizer.chat_template": text} if isinstance(text, str) and text else {}


def _says(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, or nothing."""
    found = folder / "tokenizer_config.json"
    return dict(json.loads(found.read_text(encoding="utf-8"))) if found.is_file() else {}


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def special(checkpoint: Checkpoint, folder: Path, names: list[str], file: Path, needs_end: bool) -> dict[str, Any]:
    """The ids of the special tokens, and whether the text is framed by them."""
    from tokenizers import Tokenizer

    says = _says(folder)
    ids = {role: _id(role, says, checkpoint.config, names) for role in ("bos", "eos", "unk", "pad")}
    if needs_end and ids["eos"] is None:                           # llama.cpp would fall back to GPT-2's id 11, some word of this vocabulary
        raise FormatError(f"{file}: llama.cpp needs to know the token that ends a text; name it as eos_token in tokenizer_config.json or "
                          "eos_token_id in config.json")
    frame = Tokenizer.from_file(str(file)).encode("").ids
    first, last = frame[:1] == [ids["bos"]], len(frame) > 0 and frame[-1:] == [ids["eos"]]
    if len(frame) != first + last:
        raise FormatError(f"{file}: the tokenizer frames every text with the ids {frame}; GGUF can only say bos before and eos after it")
    keys: dict[str, Any] = {f"tokenizer.ggml.{word}_token_id": ids[role]
                            for role, word in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")) if ids[role] is not None}
    return {**keys, "tokenizer.ggml.add_bos_token": first, "tokenizer.ggml.add_eos_token": last}


def _id(role: str, says: dict[str, Any], config: dict[str, Any], names: list[str]) -> int | None:
    token = says.get(f"{role}_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token in names:
        return names.index(token)
    number = config.get(f"{role}_token_id")
    number = number[0] if isinstance(number, list) and number else number       # several ends: llama.cpp finds the others by their names
    return number if isinstance(number, int) and 0 <= number < len(names) else None
