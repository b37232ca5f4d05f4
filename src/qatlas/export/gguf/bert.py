"""The BERT architecture in GGUF: an encoder, which answers with vectors and not with words.

    BertModel                          vectors of the last layer; its pooler travels as `cls`, which llama.cpp uses with pooling "rank" only
    BertForSequenceClassification      pooling "rank": class scores = cls.output tanh(cls x), x the first token's vector, as in transformers
    others                             refused: GGUF's bert has no head for single tokens or masked words

How the tokens' vectors become one is `bert.pooling_type`: what the folder of the tokenizer says in sentence-transformers' manner
(1_Pooling/config.json); "rank" with a classifier; otherwise "none", a vector a token, which llama.cpp's --pooling overrules.

llama.cpp computes every text as the first of a pair (token type 0), and gelu by its tanh formula: a model trained with the erf one ("gelu") is off by
some 1e-3 of a unit there, whatever the file says. Positions and token types are written as F32, since llama.cpp adds them as they lie.

Source: src/models/bert.cpp and build_pooling in src/llama-graph.cpp of llama.cpp. Otherwise than conversion/bert.py, which leaves the pooler out and
so loses the tanh layer of a classifier.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...core.error import FormatError

PARTS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "attention.output.LayerNorm",
         "intermediate.dense", "output.dense", "output.LayerNorm")
OWN = {"pooler.dense": "cls", "classifier": "cls.output"}          # the package knows RoBERTa's names for these
ENDS = ("embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings", "embeddings.LayerNorm", *OWN)
BIASED = (*PARTS, "embeddings.LayerNorm", *OWN)
POOLER, HEAD = OWN.values()
PLAIN = ("position_embd.weight", "token_types.weight")             # always F32
POOLING = {"pooling_mode_mean_tokens": 1, "pooling_mode_cls_token": 2, "pooling_mode_lasttoken": 3}
RANK = 4


def numbers(config: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """config.json -> the keys that llama.cpp needs to build the model.

    Raises:
        FormatError: a decoder, another activation, other positions.
    """
    for key, allowed in (("hidden_act", ("gelu", "gelu_new", "gelu_pytorch_tanh")), ("position_embedding_type", ("absolute", None)),
                         ("is_decoder", (False, None)), ("add_cross_attention", (False, None))):
        if config.get(key, allowed[0]) not in allowed:
            raise FormatError(f"GGUF's bert has {key}={' or '.join(map(repr, allowed))}, the config says {config[key]!r}")
    try:
        keys = {
            "bert.context_length": config["max_position_embeddings"],
            "bert.embedding_length": config["hidden_size"],
            "bert.block_count": config["num_hidden_layers"],
            "bert.feed_forward_length": config["intermediate_size"],
            "bert.attention.head_count": config["num_attention_heads"],
            "bert.attention.layer_norm_epsilon": float(config["layer_norm_eps"]),
            "bert.attention.causal": False,
            "bert.vocab_size": config["vocab_size"],
            "tokenizer.ggml.token_type_count": config["type_vocab_size"],
        }
    except KeyError as missing:
        raise FormatError(f"the config lacks {missing}, which GGUF needs") from None
    if f"{HEAD}.weight" in names:
        labels = {int(i): str(name) for i, name in (config.get("id2label") or {}).items()}
        keys |= {"bert.pooling_type": RANK, "bert.classifier.output_labels": [labels[i] for i in sorted(labels)]}
    return keys


def pooling(folder: Path | None) -> dict[str, Any]:
    """The pooling that sentence-transformers wrote beside the tokenizer, if it did.

    Raises:
        FormatError: one that llama.cpp does not have.
    """
    file = None if folder is None else Path(folder) / "1_Pooling" / "config.json"
    if file is None or not file.is_file():
        return {}
    said = [mode for mode, on in json.loads(file.read_text(encoding="utf-8")).items() if mode.startswith("pooling_mode_") and on is True]
    if len(said) != 1 or said[0] not in POOLING:
        raise FormatError(f"{file}: llama.cpp pools by one of {', '.join(POOLING)}; here stands {', '.join(said) or 'none'}")
    return {"bert.pooling_type": POOLING[said[0]]}
