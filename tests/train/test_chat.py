"""The mask of a conversation is exact, and padding moves nothing."""

import pytest
import torch
from tiny import letters, llama

from qatlas.core.error import DataError
from qatlas.train.chat import Chat


class Letters:
    """A tokenizer of one id a character, and a template where it is given one."""

    eos_token, pad_token_id = "\x03", 0

    def __init__(self, template=None):
        self.chat_template = template

    def encode(self, text, add_special_tokens=False, **_):
        assert not add_special_tokens
        return [ord(c) for c in text]

    def apply_chat_template(self, talk, tokenize, add_generation_prompt):
        import jinja2

        return jinja2.Template(self.chat_template).render(messages=talk, add_generation_prompt=add_generation_prompt)


TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]
PLAIN = ("<s>{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{{ m.content }}<e>{% else %}{{ m.content }}{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}[assistant]{% endif %}")
FORGETS = ("{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and not loop.last %}..{% else %}{{ m.content }}{% endif %}{% endfor %}"
           "{% if add_generation_prompt %}[assistant]{% endif %}")
REFUSES = "{% if add_generation_prompt %}new{% else %}{% for m in messages %}{{ m.content }}{% endfor %}{% endif %}"


@pytest.mark.parametrize("make, said", [
    (lambda: Chat([[{"role": "user", "content": "hi"}]] * 2, Letters(), length=32), "none of 1 training conversations"),
    (lambda: Chat([TALK] * 2, Letters(), length=8), "larger length"),
    (lambda: Chat([[{"from": "user", "value": "hi"}]] * 2, Letters()), "needs role and content"),
])
def test_constructors_fail_early(make, said):
    with pytest.raises(DataError, match=said):
        make()


@pytest.mark.parametrize("template, whole, answers", [
    (None, "System: be brief\nUser: 1+1?\nAssistant: 2\x03User: 2+2?\nAssistant: four\x03", ["2\x03", "four\x03"]),
    (PLAIN, "<s>[system]be brief[user]1+1?[assistant]2<e>[user]2+2?[assistant]four<e>", ["2<e>", "four<e>"]),
    (FORGETS, "[system]be brief[user]1+1?[assistant]..[user]2+2?[assistant]four", ["four"]),
])
def test_the_mask_of_a_conversation_is_exact(template, whole, answers):
    batch = Chat([TALK, TALK], Letters(template), batch=1).batch(0)
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert "".join(map(chr, ids)) == whole
    assert [label for label in labels if label != -100] == [ord(c) for c in "".join(answers)]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    at = [whole.index(answer, len(whole) // 2 if answer.startswith("four") else 0) for answer in answers]
    assert [i for i, label in enumerate(labels) if label != -100] == [i for start, answer in zip(at, answers, strict=True)
                                                                      for i in range(start, start + len(answer))]


def test_a_template_without_a_prompt_is_refused():
    with pytest.raises(DataError, match="chat template"):
        Chat([TALK, TALK], Letters(REFUSES))


def test_conversations_are_padded_and_padding_moves_nothing():
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    subject = Chat([TALK, short, TALK], Letters(), batch=2)
    batch = subject.take([0, 1], 0)
    assert batch["attention_mask"].sum(1).tolist() == [len(e[0]) for e in subject.examples[0]]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert subject.weight(batch) == 2 + 5 + 2

    class Low:
        eos_token, pad_token_id, chat_template = "\x03", 0, None

        def encode(self, text, **_):
            return letters(text)

    subject, model = Chat([TALK, short, TALK], Low(), batch=2, length=64), llama().eval()
    alone = subject.take([1], 0)
    both = subject.take([0, 1], 0)
    n = alone["input_ids"].shape[1]
    torch.testing.assert_close(subject.logits(model, both)[1, :n], subject.logits(model, alone)[0], atol=1e-5, rtol=1e-4)


def test_prompt_and_response(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 4)
    batch = Chat(str(tmp_path / "a.jsonl"), Letters(), batch=2).batch(0)
    assert "".join(map(chr, batch["input_ids"][0])) == "User: a\nAssistant: b\x03"
    (tmp_path / "b.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 4)
    with pytest.raises(DataError, match="found: question, answer"):
        Chat(str(tmp_path / "b.jsonl"), Letters())


def test_one_conversation_is_not_trained_on_and_judged_by():
    with pytest.raises(DataError, match="too few to hold one out"):
        Chat([TALK], Letters())
