"""The reader of SQuAD's JSON, and answers in passages."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import cast

from prelm_jax.data.examples import Answers
from prelm_jax.errors import InputError
from prelm_jax.finetuning.records import Malformed, Record, object_fields, parse_json, shown, text_lines


def read_squad(path: str, used: Sequence[str], header: bool | None, counts: Counter[str]) -> Iterator[Record]:
    """The questions, each with its passage as `context`."""
    content = parse_json("".join(line for _, line in text_lines(path)))
    try:
        for article in cast(dict, content)["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    record = question | {"context": paragraph["context"]}
                    yield f"{path}: question {question['id']}", object_fields(record)
    except (KeyError, TypeError, AttributeError) as error:
        problem = content if isinstance(content, Exception) else f"{type(error).__name__}: {error}"
        raise InputError(
            f"{path} is not SQuAD's JSON, data > paragraphs > context, qas > id, question, answers ({problem}); if it "
            "has an object a line, give ,format=jsonl"
        ) from None


def answers(value: object, passage: str) -> Answers:
    """Answers from [{"text", "answer_start"}, …] or {"text": […], "answer_start": […]}, checked against the passage."""
    try:
        if isinstance(value, dict):
            pairs = list(zip(value["text"], value["answer_start"], strict=True))
        else:
            pairs = [(each["text"], each["answer_start"]) for each in cast(list[dict], value)]
        found = [passage[start : start + len(text)] == text != "" for text, start in pairs]
    except (KeyError, TypeError, ValueError):
        raise Malformed(f"has answers {shown(value)}, which are not objects with text and answer_start") from None
    if not all(found):
        text, start = pairs[found.index(False)]
        raise Malformed(f"has the answer {shown(text)}, which is not in its passage at character {start}")
    return Answers(tuple(text for text, _ in pairs), tuple(start for _, start in pairs))
