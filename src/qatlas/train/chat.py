"""Chat: conversations, of which only the assistant's answers are learned.

Context and answer are tokenized apart, as they are when the model is used: a token never spans the two, and the mask is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..core.error import DataError
from . import data, loss
from .run import Run
from .task import Batch, LanguageModelling, Task, encode


class Chat(LanguageModelling):
    """Conversations, of which only the assistant's answers are learned.

    messages: an address of a table with a column `messages` (a list of {"role", "content"}) or columns `prompt` and `response`; or such lists
    themselves. Context and answer are tokenized apart, as they are when the model is used: a token never spans the two, and the mask is exact.
    Where a template rewrites earlier turns as the conversation grows (it drops old reasoning), only the last answer is learned. Without a template:
    "User: ...\\nAssistant: ...".

    Raises:
        DataError: no conversation with an answer within `length` tokens.
    """

    def __init__(self, messages: str | Sequence[Sequence[dict[str, str]]], tokenizer: Any, *, length: int = 512, batch: int = 8,
                 held_out: str | None = None, target: str | None = None, extra_rules: Sequence[Any] = (), run: Run | None = None) -> None:
        Task.__init__(self, batch, target, extra_rules, run)
        self.length, self.tokenizer, self.padding = length, tokenizer, getattr(tokenizer, "pad_token_id", None) or 0
        parts = _conversations(messages, held_out)
        self.examples = [[e for e in (_masked(tokenizer, talk, length) for talk in part) if any(e[1][1:])] for part in parts]
        for part, kept, name in zip(parts, self.examples, ("training", "held-out"), strict=True):
            if not kept:
                raise DataError(f"none of {len(part)} {name} conversations has an assistant's answer within {length} tokens; "
                                "give a larger length, or other data")
        self.rows, self.held_rows = map(len, self.examples)
        self._mark(length, data.digest(repr(self.examples).encode() for _ in "1"))

    def take(self, index: np.ndarray, step: int | None) -> Batch:
        chosen = [self.examples[0 if step is not None else 1][i] for i in index]
        n = max(len(ids) for ids, _ in chosen)
        ids, labels = torch.full((len(chosen), n), self.padding), torch.full((len(chosen), n), loss.IGNORE)
        seen = torch.zeros(len(chosen), n, dtype=torch.long)
        for row, (tokens, mask) in enumerate(chosen):
            ids[row, : len(tokens)], seen[row, : len(tokens)] = torch.tensor(tokens), 1
            labels[row, : len(tokens)] = torch.where(torch.tensor(mask), torch.tensor(tokens), loss.IGNORE)
        return {"input_ids": ids, "attention_mask": seen, "labels": labels}


def _conversations(messages: Any, held_out: str | None) -> tuple[list[Any], list[Any]]:
    if not isinstance(messages, str):
        cut = max(1, len(messages) // data.HELD)
        if len(messages) <= cut:
            raise DataError(f"{len(messages)} conversations are too few to hold one out; give two or more")
        return list(messages[:-cut]), list(messages[-cut:])
    found = data.table(messages, held_out)
    return _talks(messages, found.train), _talks(messages, found.held_out)


def _talks(address: str, rows: dict[str, Any]) -> list[Any]:
    if "messages" in rows:
        return list(rows["messages"])
    if {"prompt", "response"} <= set(rows):
        pairs = zip(rows["prompt"], rows["response"], strict=True)
        return [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r in pairs]
    raise DataError(f"{address} has no column 'messages', nor 'prompt' and 'response'; found: {', '.join(rows)}")


def _masked(tokenizer: Any, talk: Sequence[dict[str, str]], length: int) -> tuple[list[int], list[bool]]:
    """Ids and which of them are an answer's, cut to `length`."""
    for message in talk:
        if not {"role", "content"} <= set(message):
            raise DataError(f"a message has the fields {', '.join(message) or 'none'}; it needs role and content")
    ids: list[int] = []
    mask: list[bool] = []
    for piece, answer in _pieces(tokenizer, list(talk)):
        tokens = encode(tokenizer, piece)
        ids, mask = ids + tokens, mask + [answer] * len(tokens)
    return ids[:length], mask[:length]


def _pieces(tokenizer: Any, talk: list[dict[str, str]]) -> list[tuple[str, bool]]:
    """The rendered conversation in pieces, context and answers in turn."""
    def render(part: list[dict[str, str]], prompt: bool) -> str:
        if getattr(tokenizer, "chat_template", None):
            return str(tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)) if part or prompt else ""
        end = getattr(tokenizer, "eos_token", None) or "\n"
        said = "".join(f"{m['role'].capitalize()}: {m['content']}{end if m['role'] == 'assistant' else chr(10)}" for m in part)
        return said + ("Assistant: " if prompt else "")

    answers = [i for i, message in enumerate(talk) if message["role"] == "assistant"]
    for chosen in (answers, answers[-1:]):
        pieces, done = [], ""
        for i in chosen:
            head = render(talk[:i], True)
            full = render(talk[: i + 1], False)
            if not (head.startswith(done) and full.startswith(head)):
                break
            pieces += [(head[len(done) :], False), (full[len(head) :], True)]
            done = full
        else:
            return pieces
    raise DataError("the tokenizer's chat template does not put an answer behind the prompt that it renders for it, "
                    "so its tokens cannot be told apart; give a tokenizer with another template")
