"""One small random model of each architecture, with what tells it from Llama switched on; and tokenizers of their kinds."""

import json

import torch
from tiny_llama import MATRICES, TEXT
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qatlas.export import Checkpoint
from qatlas.export.gguf import vocab

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 310,
         "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
NEAR_FAR = {"sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}}
OWN = {                                                           # model_type -> class, config
    "mistral": ("MistralForCausalLM", {"sliding_window": 128, "head_dim": 32}),
    "qwen2": ("Qwen2ForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 128, "tie_word_embeddings": True}),
    "gemma": ("GemmaForCausalLM", {"head_dim": 32}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 256, "sliding_window": 8}),
    "gemma2 other": ("Gemma2ForCausalLM", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "attn_logit_softcapping": 2.0,
                                           "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 256, "sliding_window": 8, "num_hidden_layers": 7}),
    "gemma3 other": ("Gemma3ForCausalLM", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 7,
                                           "rope_parameters": NEAR_FAR, "tie_word_embeddings": False}),
    "bert": ("BertModel", {"hidden_act": "gelu"}),
    "bert classifier": ("BertForSequenceClassification", {"hidden_act": "gelu_new", "num_labels": 3}),
}
LAYERS = (*MATRICES, "query", "key", "value", "dense")


def model(name, **changes):
    """Random weights of a size that makes every part count; norms beside 1, or beside 0 where 1 is added to them."""
    import transformers

    kind, own = OWN[name]
    made = getattr(transformers, kind)
    torch.manual_seed(0)
    made = made(made.config_class(**{**SIZES, **own, **changes})).eval()
    centre = 0.0 if name.startswith("gemma") else 1.0
    with torch.no_grad():
        for at, weight in made.named_parameters():
            noise = torch.randn_like(weight)
            weight.copy_((noise * 0.12).half().float() if weight.dim() == 2 else 0.1 * noise + centre * ("orm" in at and at.endswith("weight")))
    return made


def checkpoint(made, quant=None, tokenizer=None):
    """As tiny_llama.checkpoint, for all of them: the layers in the blocks quantized, the same numbers written back into the model."""
    tensors = {}
    for name, weight in made.state_dict().items():
        if made.config.tie_word_embeddings and name == "lm_head.weight":
            continue
        matrix = name.endswith("weight") and "layer" in name and name.split(".")[-2] in LAYERS
        tensors[name] = quant.quantize(weight) if matrix and quant is not None else weight.clone()
    made.load_state_dict({name: t if isinstance(t, torch.Tensor) else t.dequantize() for name, t in tensors.items()}, strict=False)
    return Checkpoint(made.config.to_dict(), tensors, tokenizer, "tiny")


def _saved(folder, tokenizer, **says):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(says))
    return folder


def byte_level(folder, pattern, normalizer=None, ignore_merges=False):
    """BPE over bytes behind a regular expression, as Qwen's and tekken."""
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(TEXT * 10, trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>", "<|im_end|>"], show_progress=False,
                                                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return _saved(folder, made, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template="{{ messages[0].content }}")


def qwen2(folder):
    return byte_level(folder, vocab.QWEN2, normalizers.NFC())


def tekken(folder):
    return byte_level(folder, vocab.TEKKEN, ignore_merges=True)


def gemma(folder):
    """Gemma's: no space in front, runs of spaces and newlines as pieces of their own, which are added tokens too."""
    letters = sorted(set("".join(TEXT[:2]).replace(" ", "")) | {"▁", "\n"})
    joined = ["▁▁", "▁▁▁", "\n\n", "th", "▁th", "the", "▁the", "at", "▁c", "it", "tt", "le", "▁l", "▁lit", "ttle"]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *joined]
    ids = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [(piece[:i], piece[i:]) for piece in joined for i in range(1, len(piece)) if piece[:i] in ids and piece[i:] in ids]
    made = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    made.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    made.add_tokens(["\n\n", "▁▁", "▁▁▁"])
    return _saved(folder, made, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")


def bert(folder, lowercase=True, strip_accents=None):
    letters = "abcdefghijklmnopqrstuvwxyz0123456789éï"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *".,!?;'-–", *("##" + c for c in letters), "the", "cat", "The", "##ed", "##ing",
              "日", "naïve", "naive", "café", "cafe"]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)])
    made.add_special_tokens(pieces[:5])
    return _saved(folder, made, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]")


TOKENIZERS = {"qwen2": qwen2, "tekken": tekken, "gemma": gemma, "bert": bert,
              "bert, cased": lambda folder: bert(folder, False), "bert, small letters with accents": lambda folder: bert(folder, True, False),
              "bert, cased without accents": lambda folder: bert(folder, False, True)}
