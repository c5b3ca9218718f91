"""Every kind of built-in task is trained on, with words that the tiny model's tokenizer knows."""

import json

import pytest
import yaml

from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model, tree

GRID = [[4, 1, 2, 3], [3, 0, 0, 0], [0, 3, 4, 0], [2, 0, 3, 0]]
PAIR = {"input": [[1, 0]], "output": [[0, 1]]}
# A row, and the settings without which the tokenizer would meet letters or a chat.
ANSWERED = {"task__template": "{{ loop_ }}1+2=", "task__columns": {"loop_": "n"}}
TASKS = {
    "arc": ({"examples": [PAIR], **PAIR}, ANSWERED),
    "conciseness": ({"prompt": "1", "answer": "12"}, ANSWERED),
    "gsm8k": ({"question": "1", "answer": 2}, ANSWERED),
    "math": ({"problem": "1", "answer": "2"}, ANSWERED),
    "regex": ({"prompt": "1", "pattern": "[0-9]*"}, ANSWERED),
    "sudoku": ({"puzzle": GRID}, ANSWERED),
    "boolq": (
        {"passage": "1", "question": "2", "label": True},
        {"task__template": "{{ n }}=", "task__label_words": ["1", "2"]},
    ),
    "copa": (
        {"premise": "1", "choice1": "2.", "choice2": "3 4", "question": "cause", "label": 1},
        {"task__template": "{{ n }}="},
    ),
    "multiple_choice": (
        {"prompt": "1", "choices": ["2", "3", "4"], "label": "3"},
        {"task__metric": "accuracy"},
    ),
    "perplexity": ({"text": "1+2=3"}, {}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "m", tied=True)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_trained_on(tmp_path, model, name):
    row, settings = TASKS[name]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row | {"n": n}) + "\n" for n in range(6)))
    changes = {
        "task__name": name,
        "task__reward": None,
        "task__reward_workers": 0,
        "task__data": data,
        "task__heldout_data": data,
        "task__batch_size": 4,
        "es__iterations": 1,
        "es__population": 2,
    }
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump(tree(tmp_path, model=model, run_dir=tmp_path / "run", **(changes | settings)))
    )
    result = call("train", "--config", config)
    assert result.returncode == 0, result.stderr
    first, last = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["num_reward_failures"] == 0
    assert first["reward_mean"] is not None
    assert first["reward_min"] <= first["reward_mean"] <= first["reward_max"]
    assert last["heldout_reward"] is not None
