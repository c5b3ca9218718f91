"""EleutherAI's lm-evaluation-harness (extra ``eval``) reads an export, and finds what shardes finds."""

import json

import pytest
import yaml

from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model, tree

# Of lm-eval's task files; a delimiter of its own would make other prompts.
COMMON = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{prompt}}", "target_delimiter": ""}
CHOICES = {
    "task": "own_choices",
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc"}],
}
ANSWERS = {
    "task": "own_answers",
    "output_type": "generate_until",
    "doc_to_target": "{{wanted}}",
    "generation_kwargs": {"until": ["<eos>"], "do_sample": False, "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.mark.slow
def test_an_export_gets_the_same_numbers_on_local_task_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    lm_eval = pytest.importorskip("lm_eval")
    tasks = pytest.importorskip("lm_eval.tasks")
    model = tiny_model(tmp_path / "model", tied=True, vocab_size=24)
    data = tmp_path / "choices.jsonl"
    rows = [{"prompt": f"{i}+{i % 7}=", "choices": ["7", "30", "-4"], "label": i % 3} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "config.yaml"
    changes = {"es__iterations": 1, "eval__every": 0, "task__batch_size": 3}
    changes["eval__sets"] = {"choices": {"name": "multiple_choice", "data": str(data), "metric": "accuracy"}}
    config.write_text(yaml.safe_dump(tree(tmp_path, model=model, run_dir=tmp_path / "run", **changes)))
    for words in (
        ["train", "--config", config],
        ["shardes", "export", tmp_path / "run", tmp_path / "model-1"],
    ):
        done = call(*words)
        assert done.returncode == 0, done.stderr
    out = tmp_path / "answers.jsonl"
    done = call("shardes", "evaluate", "--model", tmp_path / "run", "--config", config, "--out", out)
    assert done.returncode == 0, done.stderr
    wanted = json.loads(done.stdout)["sets"]["choices"]["components"]["accuracy"]["mean"]
    assert 0 < wanted < 1

    answers = [json.loads(line) for line in out.read_text().splitlines()][:11]
    assert {answer["set"] for answer in answers} == {"heldout"}
    assert len({answer["completion"] for answer in answers}) > 3
    asked = [
        {"prompt": answer["prompt"], "wanted": answer["completion"] + "?" * (i % 3 == 0)}
        for i, answer in enumerate(answers)
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (tmp_path / "tasks").mkdir()
    for task, path in ((CHOICES, data), (ANSWERS, tmp_path / "asked.jsonl")):
        text = yaml.safe_dump(COMMON | task | {"dataset_kwargs": {"data_files": {"test": str(path)}}})
        (tmp_path / "tasks" / f"{task['task']}.yaml").write_text(text)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'model-1'},dtype=float32",
        tasks=["own_choices", "own_answers"],
        task_manager=tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )["results"]
    assert found["own_choices"]["acc,none"] == pytest.approx(wanted)
    assert found["own_answers"]["exact_match,none"] == pytest.approx(7 / 11)
