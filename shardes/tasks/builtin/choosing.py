"""Likelihood tasks: choose the text that follows the prompt, or score how likely a text is.

Nothing is generated: a member is one forward pass. The data have the columns that the data sets have on the
Hugging Face hub: SST-2 (Socher et al. 2013), BoolQ (Clark et al. 2019), COPA (Roemmele et al. 2011).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shardes.tasks.base import Choices, Prompt, Row, TaskDefinition
from shardes.tasks.rows import column, text_column, wrong
from shardes.tasks.templates import prompt_column

# What stands between a premise and what is chosen.
_COPA_JOINTS = {"cause": "because", "effect": "so"}


def label_word_task(
    name: str, own_words: Sequence[str], *, make_prompt: Callable[[Row], Prompt], texts: Mapping[str, str]
) -> TaskDefinition:
    """Return a classification task: the word of the row's ``label`` follows the prompt.

    The label is a class's index, true or false, or the word itself.

    Args:
        name: The task's name.
        own_words: One word for each class, in the order of the labels; a space is put before each. Empty:
            the user has to give them.
        make_prompt: Makes a prompt that the words fit after.
        texts: The columns that the prompt needs, and what each of them holds, for messages.
    """

    def with_label_words(words: Sequence[str] | None) -> TaskDefinition:
        if not (words or own_words):
            raise ValueError(f"{name} needs label_words, one for each class, e.g. [bad, good]")
        return label_word_task(name, words or own_words, make_prompt=make_prompt, texts=texts)

    completions = [f" {word.strip()}" for word in own_words]
    wanted = " or ".join(f"{index} ({word.strip()})" for index, word in enumerate(own_words))

    def check_row(row: Row, where: str) -> None:
        for name, holds in texts.items():
            text_column(row, name, where, wanted=holds)
        value = column(row, "label", where, wanted=wanted)
        if _index(value, own_words) is None:
            raise wrong("label", value, where, wanted=wanted)

    def choices(row: Row) -> Choices:
        gold = _index(row["label"], own_words)
        assert gold is not None, "the row was checked"
        return Choices(completions, gold)

    return TaskDefinition(name, make_prompt, check_row, choices=choices, with_label_words=with_label_words)


def _index(value: Any, words: Sequence[str]) -> int | None:
    """Return the class of a label: an index, true or false, or a word; None if it is none of these."""
    if isinstance(value, int):
        return int(value) if 0 <= value < len(words) else None
    stripped = [word.strip() for word in words]
    return stripped.index(value.strip()) if isinstance(value, str) and value.strip() in stripped else None


def _sst2_prompt(row: Row) -> Prompt:
    return f"Review: {row['sentence'].strip()}\nThe verdict on the film is"


def _boolq_prompt(row: Row) -> Prompt:
    question = row["question"].strip().removesuffix("?")
    return f"{row['passage'].strip()}\nQuestion: {question[:1].upper()}{question[1:]}?\nAnswer:"


def _classification_prompt(row: Row) -> Prompt:
    return f"{row['text'].strip()}\nLabel:"


def _copa_prompt(row: Row) -> Prompt:
    return f"{row['premise'].strip().removesuffix('.')} {_COPA_JOINTS[row['question']]}"


def _copa_choices(row: Row) -> Choices:
    return Choices([f" {_continued(row[name].strip())}" for name in ("choice1", "choice2")], row["label"])


def _continued(sentence: str) -> str:
    """Return a sentence as the second half of another one: without its capital letter."""
    first = sentence.split()[0]
    return sentence if first == "I" or first.startswith("I'") else sentence[:1].lower() + sentence[1:]


def _check_copa(row: Row, where: str) -> None:
    for name in ("premise", "choice1", "choice2"):
        text_column(row, name, where, wanted="a sentence")
    kind = column(row, "question", where, wanted="cause or effect")
    if kind not in _COPA_JOINTS:
        raise wrong("question", kind, where, wanted="cause or effect")
    label = column(row, "label", where, wanted="0 (choice1) or 1 (choice2)")
    if isinstance(label, bool) or label not in (0, 1):
        raise wrong("label", label, where, wanted="0 (choice1) or 1 (choice2)")


def _listed_choices(row: Row) -> Choices:
    texts = row["choices"]
    gold = _index(row["label"], texts)
    assert gold is not None, "the row was checked"
    return Choices([text if text[:1].isspace() else f" {text}" for text in texts], gold)


def _check_multiple_choice(row: Row, where: str) -> None:
    wanted = "a list of two or more different texts"
    texts = column(row, "choices", where, wanted=wanted)
    if (
        not isinstance(texts, list)
        or len(texts) < 2
        or not all(isinstance(text, str) and text.strip() for text in texts)
        or len({text.strip() for text in texts}) < len(texts)
    ):
        raise wrong("choices", texts, where, wanted=wanted)
    wanted = f"an index from 0 to {len(texts) - 1}, or the text of the right choice"
    label = column(row, "label", where, wanted=wanted)
    if isinstance(label, bool) or _index(label, texts) is None:
        raise wrong("label", label, where, wanted=wanted)


def _text_prompt(row: Row) -> Prompt:
    prompt: Prompt = row.get("prompt") or ""
    return prompt


def _text_choices(row: Row) -> Choices:
    return Choices([row["text"]], 0)


def _check_text(row: Row, where: str) -> None:
    text_column(row, "text", where, wanted="a text that is not empty")


TASKS = (
    TaskDefinition("copa", _copa_prompt, _check_copa, choices=_copa_choices),
    TaskDefinition("multiple_choice", prompt_column, _check_multiple_choice, choices=_listed_choices),
    TaskDefinition("perplexity", _text_prompt, _check_text, choices=_text_choices, metric="log_likelihood"),
    label_word_task("classification", (), make_prompt=_classification_prompt, texts={"text": "a text"}),
    label_word_task(
        "sst2", ("bad", "good"), make_prompt=_sst2_prompt, texts={"sentence": "a sentence of a review"}
    ),
    label_word_task(
        "boolq",
        ("no", "yes"),
        make_prompt=_boolq_prompt,
        texts={"passage": "a passage", "question": "a question about it"},
    ),
)
