"""stories260K as an ordinary Hugging Face directory: the smallest Llama that tells a story, for trying things on a model that was really trained.

The checkpoint (Karpathy's tinyllamas, 260,032 parameters, in transformers' layout) comes with its vocabulary as a list of pieces and scores, as
llama2.c keeps it. `prepare` turns that into a tokenizer.json: BPE over characters with byte fallback, a space written as U+2581 and one put before
the text. A piece may be joined from any two pieces; pieces of higher score first; two ways to the same piece in the order of their ids. That is
what transformers' converters do with a sentencepiece vocabulary, and the order in which sentencepiece itself joins.

    python runs/stories260k.py                    # QATLAS_DATA/ckpt/stories260k -> out/stories260k, then perplexity on QATLAS_DATA/text
    python runs/stories260k.py SOURCE OUT

Expected: perplexity 3.55 a token over 1,804 tokens of tinystories_5stories.txt (five stories, each with its own beginning).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path


def prepare(source_dir: str | Path, out_dir: str | Path) -> Path:
    """config.json and model.safetensors as they are, tokenizer.json and tokenizer_config.json from tok512.json."""
    source, out = Path(source_dir), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, out / name)
    vocab = json.loads((source / "tok512.json").read_text(encoding="utf-8"))
    tokenizer(vocab["pieces"], vocab["scores"]).save(str(out / "tokenizer.json"))
    says = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}
    (out / "tokenizer_config.json").write_text(json.dumps(says, indent=1))
    return out


def tokenizer(pieces: list[str], scores: list[float]):
    """Pieces (bytes as latin-1; 0 unknown, 1 begin, 2 end, 3 .. 258 single bytes) and scores -> tokenizers.Tokenizer."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    names = ["<unk>", "<s>", "</s>", *(piece.encode("latin-1").decode().replace(" ", "▁") for piece in pieces[3:])]
    ids = {name: i for i, name in enumerate(names)}
    merges = []
    for name in sorted(names[259:], key=lambda name: -scores[ids[name]]):
        ways = [(name[:i], name[i:]) for i in range(1, len(name)) if name[:i] in ids and name[i:] in ids]
        merges += sorted(ways, key=lambda way: (ids[way[0]], ids[way[1]]))
    made = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def perplexity(folder: str | Path, text: str) -> tuple[float, int]:
    """Per token, over stories separated by <|endoftext|>, each from its own beginning -> perplexity, tokens."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    model, tokens = LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for story in filter(None, (part.strip() for part in text.split("<|endoftext|>"))):
        ids = torch.tensor([tokens(story)["input_ids"]])[:, :512]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return float(torch.tensor(total / count).exp()), count


if __name__ == "__main__":
    data = Path(os.environ.get("QATLAS_DATA", "."))
    source, out = (sys.argv[1:] + [str(data / "ckpt" / "stories260k"), "out/stories260k"][len(sys.argv) - 1 :])[:2]
    folder = prepare(source, out)
    found, count = perplexity(folder, (data / "text" / "tinystories_5stories.txt").read_text(encoding="utf-8"))
    print(f"{folder}: perplexity {found:.3f} over {count} tokens")
