"""The language model of the zoo: text, tokenizer, weights, made from nothing but a CPython.

Quantization can only be judged on a model that knows something: random weights lose nothing at two bits. So the package carries one that was
trained, small enough to ship (3.4 M parameters, 6.8 MB in fp16) and large enough to be hurt. This file makes it, in four acts:

    documents    what CPython says about itself: pydoc_data.topics, the docstrings of the standard library's own .py files, and their comments of
                 two lines and more, read as text and never imported. Longest first; a paragraph that an earlier document has already said is
                 taken out, so that no long paragraph of the held-out text was ever trained on. A document is held out when its sha256 says
                 so (1 in 20).
    tokenizer    byte-level BPE, 1,024 entries, GPT-2's pre-tokenizer: llama.cpp reads it as tokenizer.ggml.model = "gpt2", pre = "gpt-2".
    training     LlamaForCausalLM, 4 layers of 256; AdamW, warm-up, cosine, cool-down; documents shuffled anew in each epoch. The text is small, so
                 the model learns it by heart: weight decay is ten times the usual, the rate goes down when the held-out loss no longer does,
                 and the weights kept are those with the lowest held-out loss.
    directory    what from_pretrained wants, both texts, and SOURCES.md with hashes and the numbers measured on what was written.

The texts and the tokenizer are the same bytes for one CPython release (x.y.z), on every machine whose distribution did not take modules out;
another release has other docstrings. The weights repeat only on the same kind of processor with the same torch: sums are rounded in another order.

    python runs/zoo_gpt.py --out src/qatlas/model/zoo/gpt --bf16
"""

import argparse
import ast
import hashlib
import inspect
import itertools
import json
import lzma
import math
import platform
import random
import re
import sysconfig
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"                                             # before each document, and after the last
SEED = 20
CONTEXT = 512
VOCABULARY = 1024
ELSEWHERE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}   # encodings: one sentence, 100 table names


# ---- documents ------------------------------------------------------------------------------------------------------------------------------


def sources() -> Iterator[str]:
    """The standard library's .py files, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if ELSEWHERE.isdisjoint(path.relative_to(root).parts[:-1]):
            with tokenize.open(path) as file:                     # in the encoding that the file declares
                yield file.read()


def docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (said := ast.get_docstring(node)):
            yield said


def comments(source: str) -> Iterator[str]:
    """Blocks of two comment lines and more, without their #."""
    for block in re.finditer(r"(?:^[ \t]*#[^\n]*\n){2,}", source, re.MULTILINE):
        yield "\n".join(line.strip()[1:].removeprefix(" ") for line in block[0].splitlines())


def is_prose(said: str) -> bool:
    """English sentences, not a table, a grammar or a listing: words are two thirds of it, and some of them are the small ones."""
    words = re.findall(r"[A-Za-z']+", said)
    small = sum(word.lower() in {"the", "a", "an", "of", "to", "is", "in", "and", "or", "for", "if", "this", "that", "with", "be"} for word in words)
    return len(said) > 80 and sum(map(len, words)) > 0.6 * len(re.sub(r"\s", "", said)) and small > 0.1 * len(words)


def documents() -> list[str]:
    """Cleaned, free of repeats, shuffled with a fixed seed."""
    everything = [*topics.values(), *(one for source in sources() for read in (docstrings, comments) for one in read(source))]
    said = {"\n".join(line.rstrip() for line in inspect.cleandoc(one).splitlines()) for one in everything}
    heard, kept = set(), []
    for one in sorted((s for s in said if is_prose(s)), key=lambda s: (-len(s), s)):
        news = [p for p in re.split(r"\n{2,}", one) if len(p) < 60 or " ".join(p.split()) not in heard]
        heard.update(" ".join(p.split()) for p in news)
        if len(rest := "\n\n".join(news)) > 80 and END not in rest:
            kept.append(rest + "\n")
    random.Random(SEED).shuffle(kept)
    return kept


def is_held_out(document: str) -> bool:
    return hashlib.sha256(document.encode()).digest()[0] % 20 == 0


# ---- tokenizer ------------------------------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; END is entry 0, then the 256 bytes, then 767 merges."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bytes_ = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=bytes_))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT,
                                   clean_up_tokenization_spaces=False)


# ---- training -------------------------------------------------------------------------------------------------------------------------------


def fresh_model() -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}))


def batches(encoded: list[Tensor], rows: int) -> Iterator[Tensor]:
    """Without end: the documents in a new order each epoch, as one stream, cut into (rows, CONTEXT + 1) at random places."""
    order = random.Random(SEED)
    while True:
        stream = torch.cat(order.sample(encoded, len(encoded)))[order.randrange(CONTEXT):]
        usable = (len(stream) - 1) // (rows * CONTEXT) * rows * CONTEXT
        windows = stream[:usable + 1].unfold(0, CONTEXT + 1, CONTEXT)          # (windows, CONTEXT + 1)
        for picked in torch.tensor(order.sample(range(len(windows)), len(windows))).split(rows):
            yield windows[picked]


@torch.no_grad()
def surprise(model: LlamaForCausalLM, ids: Tensor, bf16: bool = False) -> float:
    """Mean negative log-likelihood in nats of each token but the first; windows of CONTEXT side by side, none overlapping. ids: (tokens,)"""
    model.eval()
    total = 0.0
    for start in range(0, len(ids) - 1, 16 * CONTEXT):
        for rows in _whole_rows(ids[start:start + 16 * CONTEXT + 1]):
            total += nll(model, rows, bf16).item() * (rows.numel() - len(rows))
    model.train()
    return total / (len(ids) - 1)


def _whole_rows(ids: Tensor) -> list[Tensor]:
    whole = (len(ids) - 1) // CONTEXT * CONTEXT
    parts = [ids[:whole + 1].unfold(0, CONTEXT + 1, CONTEXT)] if whole else []
    return parts + ([ids[whole:][None]] if len(ids) - 1 > whole else [])


def nll(model: LlamaForCausalLM, rows: Tensor, bf16: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits         # (rows, CONTEXT, vocabulary)
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def pace(step: int, asked: argparse.Namespace) -> float:
    """The learning rate of step 1, 2, ...: warm-up, a cosine that would end at `horizon`, and a straight way down over the last `cooldown` steps."""
    along = math.cos(math.pi * min(1.0, (step - 1) / asked.horizon))
    return asked.lr * min(1.0, step / 100) * (0.51 + 0.49 * along) * min(1.0, (asked.steps + 1 - step) / asked.cooldown)


def train(model: LlamaForCausalLM, encoded: list[Tensor], held: Tensor, asked: argparse.Namespace) -> dict[str, float]:
    """Leaves the weights of the lowest held-out loss in the model. A run that was stopped goes on from `asked.state`."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": asked.decay}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.95))
    now = {"step": 0, "tokens_seen": 0, "seconds": 0.0, "best": math.inf, "best_step": 0, "kept": {}}
    if asked.state.exists():
        now = torch.load(asked.state, weights_only=True)
        model.load_state_dict(now.pop("model"))
        optimizer.load_state_dict(now.pop("optimizer"))
    begun, recent = time.time() - now["seconds"], []
    steps = range(now["step"] + 1, asked.steps + 1)
    for step, rows in zip(steps, itertools.islice(batches(encoded, asked.rows), now["step"], None), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = pace(step, asked)
        loss = nll(model, rows, asked.bf16)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        now |= {"step": step, "tokens_seen": now["tokens_seen"] + rows.numel() - len(rows), "seconds": time.time() - begun}
        if step % 20 == 0:
            print(f"step {step}/{asked.steps}  train {sum(recent) / len(recent):.4f}  lr {pace(step, asked):.2e}  "
                  f"{now['tokens_seen'] / now['seconds']:.0f} tokens/s  {now['seconds']:.0f} s", flush=True)
            recent = []
        if step % asked.look == 0 or step == asked.steps:
            there = surprise(model, held, asked.bf16)
            print(f"step {step}  held-out {there:.4f}  perplexity {math.exp(there):.3f}{'  best' if there < now['best'] else ''}", flush=True)
            if there < now["best"]:
                now |= {"best": there, "best_step": step, "kept": {name: p.detach().clone() for name, p in model.named_parameters()}}
            torch.save(now | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, aside := asked.state.with_suffix(".aside"))
            aside.replace(asked.state)
    model.load_state_dict(now["kept"], strict=False)              # the tied head is not among the parameters
    asked.state.unlink()
    return {name: now[name] for name in ("best_step", "tokens_seen", "seconds")}


# ---- directory ------------------------------------------------------------------------------------------------------------------------------


SOURCES = """# Where this model comes from

A language model of {parameters:,} parameters that knows one thing: how Python's documentation talks. Made by `runs/zoo_gpt.sh` from what
CPython {python} says about itself; {steps} steps, {epochs:.1f} passes over the text, {minutes:.0f} minutes on two cores.

| file | what | sha256 of the text, uncompressed |
|---|---|---|
| `train.txt.xz` | {train_documents:,} documents, {train_bytes:,} bytes, {train_tokens:,} tokens | `{train_sha256}` |
| `heldout.txt.xz` | {heldout_documents:,} documents, {heldout_bytes:,} bytes, {heldout_tokens:,} tokens | `{heldout_sha256}` |
| `model.safetensors` | fp16; the output head is the embedding, stored once | |
| `tokenizer.json` | byte-level BPE, 1,024 entries; pre-tokenizer of GPT-2; `<|endoftext|>` (0) begins, ends and pads | |

**Text.** `pydoc_data.topics`, and the docstrings and comment blocks of the standard library's `.py` files (tests, encodings and site-packages
left out), English sentences only, each long paragraph once, in UTF-8. `<|endoftext|>` stands before each document and after the last. One
document in 20 is held out, by its sha256. Copyright Python Software Foundation, licence PSF-2.0; https://docs.python.org/3/license.html has
its words, and names the few modules that came to CPython with notices of their own.

**Weights and tokenizer.** Ours, Apache-2.0. LlamaForCausalLM: hidden 256, intermediate 768, 4 layers, 4 query heads and 2 key/value heads of 64,
context 512. AdamW, learning rate {lr}, weight decay {decay}, steps of {rows} x 512 tokens; cosine toward step {horizon}, cool-down over
the last {cooldown}.

**Measured** on the files as they lie here: weights fp16, computed in fp32; windows of 512 side by side, each token but the first of the stream
predicted once, `<|endoftext|>` among them; bytes are those of the text without `<|endoftext|>`.

| text | tokens | nats per token | perplexity | bits per byte |
|---|---|---|---|---|
{measured}

The held-out loss chose the checkpoint (step {best_step} of {steps}, looked at every {look}), the moment of the cool-down and the length of
the run, so its number flatters a little. The train text is largely known by heart: compare quantizers on the held-out one.
Made with torch {torch}, transformers {transformers}, tokenizers {tokenizers}. Texts and tokenizer repeat exactly with CPython {python};
weights to the processor's rounding.

{prompt!r} goes on, greedily:

```text
{sample}
```
"""
PROMPT = "Return a string"


def joined(documents: list[str]) -> str:
    return "".join(END + document for document in documents) + END


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def write(out: Path, tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, texts: dict[str, list[str]]) -> None:
    """The model in fp16 goes to `out`, the one in memory stays as it is."""
    out.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)                      # safetensors writes for the owner alone
    tokenizer.save_pretrained(out)
    described = json.loads((out / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (out / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")              # the name that transformers 4 knows too
    for split, documents in texts.items():
        (out / f"{split}.txt.xz").write_bytes(lzma.compress(joined(documents).encode(), preset=9 | lzma.PRESET_EXTREME))


def measure(out: Path, texts: dict[str, list[str]]) -> dict[str, object]:
    """Everything SOURCES.md says about the files in `out`, read back from them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    said: dict[str, object] = {"parameters": model.num_parameters()}
    ids = {split: encode(tokenizer, joined(documents)) for split, documents in texts.items()}
    for split, documents in texts.items():
        raw = joined(documents).encode()
        said |= {f"{split}_documents": len(documents), f"{split}_bytes": len(raw), f"{split}_tokens": len(ids[split]),
                 f"{split}_sha256": hashlib.sha256(raw).hexdigest()}
    slices = {"held out": ids["heldout"], "held out, beginning": ids["heldout"][:8193], "train, beginning": ids["train"][:49153]}
    measured = []
    for name, part in slices.items():
        nats, size = surprise(model, part), len(tokenizer.decode(part, skip_special_tokens=True).encode())
        measured.append(f"| {name} | {len(part):,} | {nats:.4f} | {math.exp(nats):.3f} | {nats * (len(part) - 1) / math.log(2) / size:.4f} |")
    start = torch.cat([torch.tensor([0]), encode(tokenizer, PROMPT)])[None]       # (1, tokens)
    spoken = model.eval().generate(start, max_new_tokens=120, do_sample=False)[0]
    return said | {"measured": "\n".join(measured), "prompt": PROMPT, "sample": tokenizer.decode(spoken, skip_special_tokens=True).strip()}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--out", type=Path, required=True)
    ask.add_argument("--steps", type=int, default=4000)
    ask.add_argument("--horizon", type=int, default=5000, help="the step at which the cosine would end")
    ask.add_argument("--cooldown", type=int, default=314, help="so many last steps go straight down to nothing")
    ask.add_argument("--rows", type=int, default=8, help="windows of 512 tokens in a step")
    ask.add_argument("--lr", type=float, default=2e-3)
    ask.add_argument("--decay", type=float, default=1.0, help="ten times the usual: the text is passed over twenty times")
    ask.add_argument("--look", type=int, default=100, help="steps between two looks at the held-out loss")
    ask.add_argument("--state", type=Path, default=Path("zoo_gpt.state"), help="where a run that is stopped goes on from")
    ask.add_argument("--threads", type=int, default=2)
    ask.add_argument("--bf16", action="store_true", help="autocast; three times faster where the processor has it, slower where not")
    asked = ask.parse_args()
    torch.set_num_threads(asked.threads)
    everything = documents()
    texts = {"train": [d for d in everything if not is_held_out(d)], "heldout": [d for d in everything if is_held_out(d)]}
    tokenizer = train_tokenizer(texts["train"])
    encoded = [encode(tokenizer, END + document) for document in texts["train"]]
    tokens = sum(map(len, encoded))
    print(f"{len(encoded)} documents, {tokens} tokens", flush=True)
    model = fresh_model()
    run = train(model, encoded, encode(tokenizer, joined(texts["heldout"])), asked)
    write(asked.out, tokenizer, model, texts)
    said = measure(asked.out, texts) | run | vars(asked) | {
        "epochs": run["tokens_seen"] / tokens, "minutes": run["seconds"] / 60, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    (asked.out / "SOURCES.md").write_text(SOURCES.format(**said))
    print(json.dumps({name: value for name, value in said.items() if not isinstance(value, Path)}, indent=1))


if __name__ == "__main__":
    main()
