"""The Countdown reward against the paper's rule, on recorded answers, right or wrong by construction."""

import json
import re
from collections import Counter
from pathlib import Path

from shardes.tasks.builtin.countdown import CHAT
from tests.helpers.countdown_answers import NUM_ANSWERS, PATH, make_answers, paper_format

DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"
ROWS = [json.loads(line) for line in PATH.read_text().splitlines()]


def ours(name):
    """One component's values for all recorded answers."""
    (component,) = [component for component in CHAT.rewards if component.name == name]
    columns = {key: [row[key] for row in ROWS] for key in ("numbers", "target", "kind")}
    return component.function([""] * len(ROWS), [row["response"] for row in ROWS], **columns)


def disagreements(name):
    return Counter(
        row["kind"] for row, value in zip(ROWS, ours(name), strict=True) if row["paper"][name] != value
    )


def test_the_file_is_what_the_helper_writes():
    assert make_answers() == ROWS
    assert len({json.dumps(row) for row in ROWS}) == NUM_ANSWERS == 200


def test_every_answer_gets_what_it_was_made_to_be_worth():
    assert ours("answer") == [float(row["right"]) for row in ROWS]
    assert ours("format") == [float(row["form"]) for row in ROWS]
    assert 60 < sum(row["right"] for row in ROWS) < 120


def test_the_papers_rule_agrees_but_for_the_cases_that_the_documentation_lists():
    documented = re.findall(r"^\| ([a-z ]+) \| (\d+) \| (\d+) \| (\d+) \|", DOCS.read_text(), re.MULTILINE)
    kinds = Counter(row["kind"] for row in ROWS)
    answer, form = disagreements("answer"), disagreements("format")
    assert answer.total() == 28
    assert form.total() == 16
    differing = [
        row
        for row, *values in zip(ROWS, ours("answer"), ours("format"), strict=True)
        if list(row["paper"].values()) != values
    ]
    assert f"agrees on the other {len(ROWS) - len(differing)}:" in DOCS.read_text()
    listed = {kind: tuple(map(int, counts)) for kind, *counts in documented}
    assert listed == {kind: (kinds[kind], answer[kind], form[kind]) for kind in answer | form}


def test_joining_prompt_and_response_rewards_the_prompts_own_example():
    text = "".join(message["content"] for message in CHAT.make_prompt({"numbers": [3, 5, 2], "target": 13}))
    example = text[text.rindex("<think>") :]
    assert paper_format(example + "") == 1
    assert CHAT.rewards[1].function([text], [""]) == [0.0]
