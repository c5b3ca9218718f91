"""Rewards for tests: they tell members apart even if the model is random."""


def spread(prompts, completions, **columns):
    """A number between 0 and 1 that changes with almost any change of the answer."""
    return [
        sum((i + 1) * ord(character) for i, character in enumerate(text)) % 97 / 97 for text in completions
    ]


def spread_of_chats(prompts, completions, **columns):
    """The same of answers that may be chat messages."""
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    return spread(prompts, texts)


def spread_on_some(prompts, completions, **columns):
    """Tells members apart on prompts with one plus alone; any other answer earns 1."""
    values = spread(prompts, completions)
    return [value if prompt.count("+") == 1 else 1.0 for prompt, value in zip(prompts, values, strict=True)]


def fragile(prompts, completions, **columns):
    """Raises on answers of even length, and is not a number for lengths that 3 divides."""
    values = []
    for text in completions:
        if len(text) % 2 == 0:
            raise ZeroDivisionError("even length")
        values.append(float("nan") if len(text) % 3 == 0 else len(text) / 10)
    return values


def always_raises(prompts, completions, **columns):
    raise KeyError("no such column")


def wrong_length(prompts, completions, **columns):
    return [1.0]
