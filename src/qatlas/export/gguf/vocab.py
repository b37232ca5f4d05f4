"""The tokenizer in the header of a GGUF file. llama.cpp brings its own tokenizers; the header says which one and gives it the pieces.

    tokenizer.json                               tokenizer.ggml.model    what is written besides the pieces and their kinds
    BPE over bytes (GPT-2, Llama 3, SmolLM)      gpt2                    merges in order; `pre`, the name of the regular expression that cuts words
    BPE over characters with byte fallback       llama                   one score a piece; no merges
      (sentencepiece: Llama 1 and 2)
    none                                         none                    llama.cpp loads the weights and can do nothing with text

llama.cpp knows each word-cutting expression by a name, so only those of the table PRE are expressible; another is refused, since a model whose
words are cut elsewhere than in training is a worse model that nobody notices.

The "llama" tokenizer has no list of merges: it joins the neighbours whose joined piece has the highest score, if it is a piece at all. That is the
same as BPE with merges in ranks when every way to cut a piece into two pieces is a merge, and all merges of one piece stand together; then the
score is minus the rank. Vocabularies that come from sentencepiece are so; those that are not are refused.

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
PRE = {                                                            # what cuts the text -> llama.cpp's name, and whether whole words skip the merges
    (("ByteLevel", True),): ("gpt-2", False),
    (("Digits", True), ("ByteLevel", True)): ("smollm", False),
    (("Split", LLAMA3), ("ByteLevel", False)): ("llama-bpe", True),
}


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
    if model.get("type") != "BPE":
        raise FormatError(f"{file}: GGUF's llama takes BPE tokenizers, this one is {model.get('type')!r}")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise FormatError(f"{file}: llama.cpp has no BPE with dropout or with word prefixes and suffixes")
    rows = checkpoint.config["vocab_size"]
    names, kinds = pieces(data, rows)
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model.get("merges", [])]
    if model.get("byte_fallback"):
        keys = _characters(data, file, names, kinds, merges)
    else:
        keys = _bytes(data, file, names, kinds, merges)
    return {**keys, **special(checkpoint, folder, names, file, needs_end=not model.get("byte_fallback"))}


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
    if data.get("normalizer") is not None:
        raise FormatError(f"{file}: llama.cpp's byte-level BPE has no normalizer, this tokenizer has {data['normalizer'].get('type')}")
    parts = data.get("pre_tokenizer") or {"type": "none"}
    parts = parts["pretokenizers"] if parts["type"] == "Sequence" else [parts]
    known = PRE.get(tuple((part["type"], _cut(part)) for part in parts))
    if known is None or known[1] != bool(data["model"].get("ignore_merges")):
        cuts = ", ".join(f"{part['type']}({_cut(part)})" for part in parts)
        raise FormatError(f"{file}: llama.cpp has no name that we know for the pre-tokenizer {cuts} with ignore_merges="
                          f"{bool(data['model'].get('ignore_merges'))}; known are those of {', '.join(name for name, _ in PRE.values())}")
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
    scores = [-float(best.get(name, len(merges))) if kind == NORMAL else 0.0 for name, kind in zip(names, kinds, strict=True)]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": names, "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.add_space_prefix": space}


def _space_prefix(data: dict[str, Any]) -> bool | None:
    """Whether a space is put before the text; None for what cannot be expressed. Old files say it in the normalizer, new ones as Metaspace."""
    norm, pre = data.get("normalizer"), data.get("pre_tokenizer")
    steps = [] if norm is None else norm["normalizers"] if norm["type"] == "Sequence" else [norm]
    replace = [step for step in steps if step["type"] == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == "▁"]
    prepend = [step for step in steps if step["type"] == "Prepend" and step.get("prepend") == "▁"]
    if pre is None and len(replace) == 1 and len(replace) + len(prepend) == len(steps) and steps[-1] is replace[0]:
        return bool(prepend)
    if not steps and pre is not None and pre["type"] == "Metaspace" and pre.get("replacement") == "▁" and not pre.get("split", True):
        return {"first": True, "always": True, "never": False}.get(pre.get("prepend_scheme"))
    return None


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def special(checkpoint: Checkpoint, folder: Path, names: list[str], file: Path, needs_end: bool) -> dict[str, Any]:
    """The ids of the special tokens, and whether the text is framed by them."""
    from tokenizers import Tokenizer

    found = folder / "tokenizer_config.json"
    says = json.loads(found.read_text(encoding="utf-8")) if found.is_file() else {}
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
