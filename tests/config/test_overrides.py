"""Values as people type them: texts stay as they are, numbers are decimal, nothing is lost silently."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shardes.config.loading import dump_config, load_config, load_run_config, parse_config
from shardes.config.yaml_text import parse_yaml
from shardes.errors import UserError
from tests.helpers.inprocess import call

TREE = {
    "model": {"path": "m"},
    "run": {"dir": "r"},
    "rollout": {"max_new_tokens": 5},
    "es": {"iterations": 7, "sigma": 0.01},
    "task": {"data": "d.jsonl", "reward": "a.py:f"},
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def value_of(config, key):
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


TYPED = [
    ("run.dir=runs/exp #3", Path("runs/exp #3")),
    ("run.dir=#3", Path("#3")),
    ("run.dir=010", Path("010")),
    ("run.dir=2024", Path("2024")),
    ("run.dir=2024-02-30", Path("2024-02-30")),
    ("run.dir=1e5", Path("1e5")),
    ("run.dir=1:30", Path("1:30")),
    ("run.dir=yes", Path("yes")),
    ("run.dir=null", Path("null")),
    ("run.dir=a: b", Path("a: b")),
    ("run.dir=a=b", Path("a=b")),
    ("run.dir={x}", Path("{x}")),
    ("run.dir=[1]", Path("[1]")),
    ("run.dir=*a", Path("*a")),
    ("run.dir=&a", Path("&a")),
    ("run.dir=!x", Path("!x")),
    ("run.dir=-", Path("-")),
    ("run.dir=läufe/größe ☃", Path("läufe/größe ☃")),
    ("run.dir='a b'", Path("a b")),
    ('run.dir="a\\tb"', Path("a\tb")),
    ("run.dir=it's", Path("it's")),
    ("run.dir='a' and 'b'", Path("'a' and 'b'")),
    ("run.dir=~/runs/a", Path.home() / "runs/a"),
    ("run.dir=~", Path.home()),
    ("run.dir=./~/a", Path("~/a")),
    ("run.dir=a~", Path("a~")),
    ("model.path=~/m", Path.home() / "m"),
    ("task.data=~/d.jsonl", Path.home() / "d.jsonl"),
    ("task.data=hf:a/b:c@train", Path("hf:a/b:c@train")),
    ("task.reward=~/r.py:f", f"{Path.home()}/r.py:f"),
    ("task.reward=r.py:f # not cut", "r.py:f # not cut"),
    ("task.template=Q: {{question}}\nA: # ", "Q: {{question}}\nA: # "),
    ("task.system=no", "no"),
    ("task.system=010", "010"),
    ("task.system=", ""),
    ("task.system=''", ""),
    ("task.system=null", None),
    ("task.system=~", None),
    ('task.system="null"', "null"),
    ("task.heldout_data=~", None),
    ("task.heldout_data=", None),
    ("es.noise=rademacher", "rademacher"),
    ("es.schedule=cosine", None),  # the old name of a text
    ("es.seed=010", 10),
    ("es.seed=08", 8),
    ("es.seed=1_000", 1000),
    ("es.seed= 5 ", 5),
    ("es.sigma=010.5", 10.5),
    ("es.sigma=1e-3", 1e-3),
    ("es.sigma=.5", 0.5),
    ("rollout.micro_batch_size=auto", "auto"),
    ("rollout.micro_batch_size=016", 16),
    ("model.trust_remote_code=true", True),
    ("rollout.stop=['###', 'a #b']", ["###", "a #b"]),
    ("rollout.stop=[010, no, ~, =, 1e3]", ["010", "no", "~", "=", "1e3"]),
    ("task.label_words=[no, yes]", ["no", "yes"]),
    ("task.label_words=null", None),
    ("task.columns.answer=010", {"answer": "010"}),
    ("task.columns={on: off, 1: 2}", {"on": "off", "1": "2"}),
    ("task.template_arguments.day=2024-01-31", {"day": "2024-01-31"}),
    ("task.template_arguments={x: 1e-3, y: 2E5, z: .5e+1}", {"x": 1e-3, "y": 2e5, "z": 5.0}),
    ("task.columns={prompt: question}", {"prompt": "question"}),
    ("eval.sets.other.data=x #1", None),
]


@pytest.mark.parametrize(("override", "wanted"), TYPED, ids=lambda value: str(value)[:40])
def test_a_value_is_what_was_typed(file, override, wanted):
    key = override.partition("=")[0]
    overrides = [override]
    if key == "es.schedule":
        key, wanted = "es.alpha_schedule", "cosine"
    if key == "task.label_words":
        overrides.append("task.name=boolq")
        overrides.append("task.reward=null")
    if key.startswith(("task.columns.", "task.template_arguments.")):
        key = key.rpartition(".")[0]
    if key.startswith("eval.sets"):
        overrides.append("eval.sets.other.reward=b.py:g")
        wanted = Path("x #1")
    found = value_of(load_config(file, overrides), key)
    assert (type(found), found) == (type(wanted), wanted)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("es.seed=5 #3", r"es\.seed: got '5 #3'"),
        ("es.seed=0x10", r"es\.seed: got '0x10'"),
        ("es.seed=1:30", r"es\.seed: got '1:30'"),
        ("es.seed=", r"es\.seed: got None"),
        ("es.seed=" + "9" * 5000, r"override 'es\.seed=9.*not valid YAML"),
        ("es.seed=1 es.sigma=2", r"es\.seed: got '1 es\.sigma=2'"),
        ("rollout.stop=[a] # b", r"'# b' would be a comment; quote it"),
        ("rollout.stop=# b", r"'# b' would be a comment; quote it"),
        ("task.columns={a: b, a: c}", "the key 'a' is given twice"),
        ("task.columns=" + "[" * 5000, "nested too deeply"),
        ("run.dir=~nobody.has.this.name/x", r"run\.dir: got ~nobody.* home directory is not known"),
        ("run.dir=a\udce9b", r"override 'run\.dir=a\\udce9b': is not UTF-8 text, or this job"),
        ("run.dir=", r"run\.dir: got an empty text"),
        ("run.dir=$HOME/x", r"run\.dir: got \$HOME/x; variables of the environment are not replaced"),
        ("model.path=${MODELS}/x", r"model\.path: got \$\{MODELS\}/x; variables"),
        ("rollout.stop=[\x07]", "not valid YAML: unacceptable character"),
        ("run.dïr=x", r"run\.dïr: unknown key; did you mean 'run\.dir'"),
    ],
    ids=lambda value: value[:30].encode(errors="replace").decode(),
)
def test_what_would_be_taken_for_something_else_is_refused(file, override, words):
    with pytest.raises(UserError, match=words):
        load_config(file, [override])


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join(['*' + before] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{after}: &{after} {{<<: [{', '.join(['*' + before] * 9)}]}}\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("es: {sigma: 1}\nrun: {dir: x}\nes: {sigma: 2}", "the key 'es' is given twice, in lines 1 and 3"),
        ("es:\n  sigma: 1\n  seed: 2\n  sigma: 3", "the key 'sigma' is given twice, in lines 2 and 4"),
        ('es: {sigma: 1, "sigma": 3}', "the key 'sigma' is given twice"),
        (f"{ALIASES}task: {{columns: *i}}", "more than 100000 values, once its aliases are replaced"),
        (f"{MERGES}task: *i", "more than 100000 values"),
        ("es: {sigma: 1}\0", "unacceptable character"),
        ("es: {x: !!binary aGk=}", "could not determine a constructor"),
        ("es: {x: !!timestamp 2024-01-31}", "could not determine a constructor"),
        ("es: &a [*a]", "an alias stands for what it is a part of"),
        ("es: &a {b: *a}", "an alias stands for what it is a part of"),
        ("es: " + "[" * 100_000, "nested too deeply"),
        ("es: " + "{a: " * 2000, "nested too deeply"),
        ("es:\n " + "- " * 2000, "nested too deeply"),
        ("x" * 300_000, "more than 131072 bytes"),
    ],
    ids=lambda value: value[:30],
)
def test_yaml_that_loses_or_multiplies_values_is_refused_at_once(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=f"(not valid YAML|cannot be read).*{words}"):
        load_config(tmp_path / "c.yaml", [])


def test_anchors_merges_and_numbers_in_files(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "base: &base {iterations: 010, sigma: 1e-3}\n"
        "model: {path: ~/m}\nrun: {dir: 2024-01-31}\nrollout: {max_new_tokens: 5}\n"
        "es: {<<: *base, sigma: 0.5}\ntask: {data: d, reward: a.py:f}\n"
    )
    with pytest.raises(UserError, match="base: unknown key"):
        load_config(tmp_path / "c.yaml", [])
    tree = parse_yaml((tmp_path / "c.yaml").read_text())
    del tree["base"]
    config = parse_config(tree, source="test")
    assert (config.es.iterations, config.es.sigma) == (10, 0.5)
    assert (config.model.path, config.run.dir) == (Path.home() / "m", Path("2024-01-31"))


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=12) | st.from_regex(r"[-+0-9._:exEabn=]{1,8}"))
def test_texts_come_back_from_the_config_of_a_run(text):
    tree = TREE | {"task": TREE["task"] | {"system": text, "template": text}}
    config = parse_config(tree, source="test")
    tree = parse_yaml(dump_config(config))
    assert (tree["task"]["system"], tree["task"]["template"]) == (text, text)


def test_a_configuration_comes_back_as_it_was_written(tmp_path, file):
    config = load_config(
        file, ["task.system=010", "es.sigma=1e-5", "rollout.stop=['1e5', '08', 'no', '1:30']"]
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    again = load_run_config(tmp_path, {})
    assert again.model_dump(exclude={"run", "model", "task"}) == config.model_dump(
        exclude={"run", "model", "task"}
    )
    assert again.task.system == "010"


def test_a_message_shows_no_more_of_a_value_than_is_needed(file):
    with pytest.raises(UserError) as caught:
        load_config(file, [f"es.sigma=[{'1, ' * 10_000}]"])
    assert len(str(caught.value)) < 600


def test_the_command_line_takes_names_that_are_not_ascii(tmp_path, file):
    result = call("train", "--config", file, "run.dir=größe", "model.path=ñandú")
    assert result.returncode == 2
    assert "model.path: ñandú/config.json does not exist" in result.stderr
