"""Environments for tests, over the characters that tiny models know."""


class Count:
    """Asks ``index % 3 + 1`` pairs of digits, then as many threes as were said ones; 2 or 3 turns.

    A turn earns by the characters of the answer, so that members differ. With ``fails_at``, the episode of
    that index raises in its second step.
    """

    def __init__(self, fails_at=None):
        self._fails_at = fails_at
        self.numbers = {"ones": 0.0}

    def reset(self, index):
        self._index, self._turn = index, 0
        return "12" * (index % 3 + 1)

    def step(self, completion):
        self._turn += 1
        if self._index == self._fails_at and self._turn == 2:
            raise ValueError("it cannot go on")
        ones = completion.count("1")
        self.numbers = {"ones": self.numbers["ones"] + ones}
        reward = ones + len(set(completion)) / 100 + (completion[:1] in "0123456789") / 1000
        return "3" * (ones % 4 + 1 + self._index % 2), reward, self._turn == 3 - self._index % 2


class Chat:
    """Talks in messages, with a system message of its own."""

    def reset(self, index):
        return [{"role": "system", "content": "(1)"}, {"role": "user", "content": f"{index}?"}]

    def step(self, completion):
        return [{"role": "user", "content": str(len(completion))}], len(completion) / 10, False


class Counter:
    """A class as TRL's environment_factory takes it: nothing in it knows of this library."""

    def reset(self, target, **kwargs):
        self.target, self.total = target, 0
        return f" ({target})"

    def increase(self, by: int) -> str:
        """Increase the counter.

        Args:
            by: By how much.
        """
        self.total += by
        return f"{self.total}"

    def get_reward(self):
        return -abs(self.target - self.total) / 10


async def talk(row, client):
    """A harness: asks two or three times, and earns by what is said."""
    name = (await client.models.list()).data[0].id
    text, earned = "12" * (row["index"] % 3 + 1), 0.0
    for _ in range(2 + row["index"] % 2):
        answer = await client.completions.create(model=name, prompt=text, max_tokens=5)
        said = answer.choices[0].text
        earned += said.count("1") + len(set(said)) / 100
        text += f"{said}3"
    return earned
