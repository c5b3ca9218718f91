"""Configuration: what is accepted, and what each mistake is answered with."""

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shardes.config.loading import dump_config, load_config, parse_config
from shardes.config.schema import EsConfig
from shardes.errors import UserError
from shardes.tasks.registry import TASKS
from tests.helpers.config_trees import MINIMAL, with_key

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def parsed(key, value):
    return parse_config(with_key(key, value), source="test")


def refusal(key, value):
    with pytest.raises(UserError) as caught:
        parsed(key, value)
    return str(caught.value)


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_there_is_a_shipped_configuration_of_every_task():
    paths = [path for path in CONFIGS if path.parent.name in ("configs", "tasks")]
    names = {path.stem: load_config(path, []).task.name for path in paths}
    assert names.pop("quickstart") == "countdown_short"
    assert names == {name: name for name in TASKS if name != "countdown_short"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_accepted_and_keep_every_value_they_give(path):
    config = load_config(path, [])
    resolved = yaml.safe_load(dump_config(config))
    for section, keys in yaml.safe_load(path.read_text()).items():
        for key, value in keys.items():
            found = resolved[section][key]
            if key == "path" and config.model.hub_id is not None:
                assert found == value
            elif isinstance(getattr(getattr(config, section), key), Path) and not value.startswith(
                ("hf:", "range:")
            ):
                assert found == str(Path(value).absolute()), f"{section}.{key}"
            elif value is not None:
                assert type(value)(found) == value, f"{section}.{key}"


def test_the_toolbox_page_explains_every_key_of_the_algorithm():
    page = (Path(__file__).parents[2] / "docs" / "toolbox.md").read_text()
    assert [key for key in EsConfig.model_fields if f"`es.{key}`" not in page] == []


def test_defaults_are_those_of_the_paper():
    config = parse_config(MINIMAL, source="test")
    assert (config.es.population, config.es.sigma, config.es.alpha) == (30, 1e-3, "auto")
    assert config.es.alpha_at(config.es.sigma) == 5e-4
    assert config.es.alpha_schedule == "constant"
    assert config.model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("es.popluation", "es.population"),
        ("es.sigm", "es.sigma"),
        ("rollout.max_tokens", "rollout.max_new_tokens"),
        ("run.directory", "run.dir"),
        ("modell", "model"),
        ("tasks", "task"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key, nearest):
    assert f"{key}: unknown key; did you mean '{nearest}'?" in refusal(key, 3)


def test_an_unknown_key_far_from_all_is_refused_with_all():
    message = refusal("eval.zzz", 1)
    assert "eval.zzz: unknown key; Known keys: every" in message
    assert "es, eval, log, model, parallel, rollout, run, task, weights" in refusal("qqqqqq", {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("es.sigma", 0),
        ("es.sigma", -1e-3),
        ("es.sigma", float("nan")),
        ("es.sigma", float("inf")),
        ("es.sigma", "small"),
        ("es.sigma", [0.1]),
        ("es.alpha", 0),
        ("es.alpha", -1.0),
        ("es.alpha", float("nan")),
        ("es.alpha", float("inf")),
        ("es.alpha", "automatic"),
        ("es.alpha", None),
        ("es.seed", -1),
        ("es.seed", 2**64),
        ("es.iterations", 0),
        ("es.iterations", 2.5),
        ("es.population", 1),
        ("es.population", 2**24),
        ("es.alpha_schedule", "exponential"),
        ("es.rank", 0),
        ("es.trainable", "(.*"),
        ("es.trainable", ["(.*"]),
        ("model.dtype", "int8"),
        ("model.path", 3),
        ("parallel.backend", "fdsp"),
        ("parallel.shard_size", 0),
        ("parallel.timeout_seconds", 0),
        ("parallel.threads_per_rank", 0),
        ("rollout.gather", "members-first"),
        ("rollout.max_new_tokens", 0),
        ("rollout.stop", [""]),
        ("rollout.temperature", -1),
        ("rollout.top_p", 0),
        ("rollout.top_k", 3),  # without a temperature
        ("rollout.samples_per_prompt", 2),
        ("rollout.micro_batch_size", "many"),
        ("run.resume", "sometimes"),
        ("run.snapshot_every", -1),
        ("run.keep_snapshots", 1),
        ("es.min_valid_fraction", 1.5),
        ("es.min_valid_fraction", float("nan")),
        ("weights.master_device", "disk"),
        ("eval.every", -1),
        ("task.name", "sudoku9"),
        ("task.sampling", "sorted"),
        ("task.heldout_fraction", 1),
        ("task.heldout_fraction", 0),
        ("task.columns", ["a"]),
        ("task.batch_size", 0),
        ("task.on_reward_error", "ignore"),
        ("model", "a/model"),
        ("es", None),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_itself(key, value):
    lines = refusal(key, value).splitlines()
    assert lines[0] == "test: the configuration cannot be used"
    assert lines[1:]
    for line in lines[1:]:
        assert line.startswith(f"  {key}: ")
        assert str(value) in line


def test_a_reward_failure_may_not_count_as_nan():
    assert "task.on_reward_error" in refusal("task.on_reward_error", float("nan"))


@pytest.mark.parametrize(
    "key", ["model.path", "run.dir", "rollout.max_new_tokens", "es.iterations", "task.data"]
)
def test_a_missing_required_key_is_named_with_the_override_that_sets_it(key):
    assert f"  {key}: missing; set it in the file, or give {key}=..." in refusal(key, ...)


@pytest.mark.parametrize("section", ["model", "run", "rollout", "es", "task"])
def test_a_missing_required_section_is_named(section):
    assert f"  {section}: missing" in refusal(section, ...)


def test_every_problem_is_listed_at_once():
    tree = with_key("es.sigma", 0) | {"rollout": {}}
    with pytest.raises(UserError) as caught:
        parse_config(tree, source="test")
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        "rollout.max_new_tokens",
        "es.sigma",
    ]


@pytest.mark.parametrize(
    ("name", "reward", "words"),
    [
        (None, None, "either name"),
        ("countdown", "a.b:c", "either name"),
        (None, "rewards.py", "'module:function' or 'file.py:function'; got 'rewards.py'"),
    ],
)
def test_a_task_has_exactly_one_reward(name, reward, words):
    message = refusal("task", {"data": "d", "name": name, "reward": reward})
    assert "  task: " in message
    assert words in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"name": "countdown", "label_words": ["a", "b"]},
            "label_words are for boolq, classification, sst2",
        ),
        ({"name": "classification"}, "classification needs label_words"),
        (
            yaml.safe_load("{name: boolq, label_words: [no, yes]}"),
            "got False; input should be a valid string; YAML takes it for a truth value",
        ),
    ],
)
def test_label_words_are_for_tasks_that_have_labels(changes, words):
    assert words in refusal("task", {"data": "d"} | changes)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("coundown", "did you mean 'countdown'? "), ("zzz", "")],
)
def test_an_unknown_task_is_refused_with_the_nearest_known_one(name, nearest):
    line = f"task.name: got {name!r}; {nearest}Known tasks: arc, arithmetic, boolq, "
    assert line in refusal("task", {"data": "d", "name": name})
    for known in TASKS:
        assert f" {known}," in f"{refusal('task', {'data': 'd', 'name': name})},"


def test_a_data_set_of_the_hub_is_no_path():
    config = parsed("task.data", "hf:some/name:main@train")
    assert yaml.safe_load(dump_config(config))["task"]["data"] == "hf:some/name:main@train"


def test_text_that_is_a_number_is_a_number(tmp_path):
    text = yaml.safe_dump(with_key("es.sigma", None)).replace("sigma: null", "sigma: 1e-3\n  alpha: 2e-4")
    assert yaml.safe_load(text)["es"]["sigma"] == "1e-3"  # as YAML 1.1 has it
    config = load_config(write(tmp_path, text), [])
    assert (config.es.sigma, config.es.alpha) == (1e-3, 2e-4)


def test_alpha_auto_is_half_of_sigma_and_a_number_is_itself():
    assert parsed("es", {"iterations": 1, "alpha": "auto"}).es.alpha_at(0.3) == 0.15
    assert parsed("es", {"iterations": 1, "alpha": 0.7}).es.alpha_at(0.3) == 0.7


@pytest.mark.parametrize("dashes", ["", "--"])
def test_overrides_change_the_file(tmp_path, dashes):
    path = write(tmp_path, yaml.safe_dump(MINIMAL))
    overrides = [
        "es.sigma=2e-2",
        "eval.every=0",
        "task.name=null",
        "task.reward=a.py:f",
        "es.seed=5",
        "es.seed=6",
    ]
    config = load_config(path, [dashes + override for override in overrides])
    assert (config.es.sigma, config.eval.every, config.es.seed) == (0.02, 0, 6)
    assert (config.task.name, config.task.reward) == (None, "a.py:f")
    assert config.es.iterations == 7
    assert load_config(path, ["run.dir=a=b"]).run.dir == Path("a=b")


@pytest.mark.parametrize("override", ["es.sigma", "--es.sigma", "=3", "--", ""])
def test_an_override_without_a_value_is_refused(tmp_path, override):
    path = write(tmp_path, yaml.safe_dump(MINIMAL))
    with pytest.raises(UserError, match=r"must look like section\.key=value"):
        load_config(path, [override])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("es.sigma=[", r"override 'es\.sigma=\[': the value is not valid YAML"),
        ("es.sigmaa=3", r"es\.sigmaa: unknown key; did you mean 'es\.sigma'"),
        ("es.sigma=", r"es\.sigma: got None"),
        ("es.sigma.x=1", r"es\.sigma: got \{'x': 1\}"),
        ("es=3", r"  es: got 3"),
    ],
)
def test_a_wrong_override_is_refused(tmp_path, override, words):
    with pytest.raises(UserError, match=words):
        load_config(write(tmp_path, yaml.safe_dump(MINIMAL)), [override])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("es: [1, 2", "not valid YAML"),
        ("es:\n\tsigma: 1", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("", "must be a mapping of sections"),
        ("- es\n- task", "must be a mapping of sections"),
        ("plain text", "must be a mapping of sections"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=words) as caught:
        load_config(path, [])
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            load_config(path, [])
    (tmp_path / "latin.yaml").write_bytes("es: größe".encode("latin-1"))
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(tmp_path / "latin.yaml", [])


def test_a_rank_is_for_noise_that_has_one():
    tree = with_key("es.rank", 4)
    with pytest.raises(
        UserError, match=r"es.rank: got 4, but es.noise is gaussian, .* set es.noise: low_rank"
    ):
        parse_config(tree, source="test")
    tree["es"]["noise"] = "low_rank"
    assert parse_config(tree, source="test").es.rank == 4


@pytest.mark.parametrize("count", [2, "auto"])
def test_many_members_in_a_forward_want_noise_of_low_rank(count):
    assert f"es: noise is gaussian, but rollout.members_per_forward: {count} needs es.noise: low_" in refusal(
        "rollout.members_per_forward", count
    )
    tree = with_key("rollout.members_per_forward", count)
    tree["es"]["noise"] = "low_rank"
    assert parse_config(tree, source="test").rollout.is_batched
    tree["parallel"] = {"backend": "tensor_parallel"}
    assert parse_config(tree, source="test").rollout.is_batched


@pytest.mark.parametrize(
    ("es", "words"),
    [
        ({"population": 1}, "es.population: got 1"),
        ({"population": {0: 1}}, "es.population: got {0: 1}"),
        ({"population": {1: 4}}, "from iteration 0 on"),
        ({"population": 5, "antithetic": True}, "es.antithetic: got true, but es.population is 5"),
        ({"population": {0: 4, 3: 5}, "antithetic": True}, "pairs take an even number"),
        ({"subspaces": 0}, "es.subspaces: got 0"),
        ({"subspaces": 4, "noise": "low_rank"}, "es.subspaces: got 4, but es.noise is low_rank"),
        ({"momentum": 0.5}, "momentum is 0.5, which only optimizer: momentum has a use for"),
        ({"optimizer": "momentum", "adam_epsilon": 0.1}, "which only optimizer: adam has a use for"),
        ({"final_sigma": 0.1}, "final_sigma is 0.1 and sigma_schedule constant"),
        ({"sigma_schedule": "linear"}, "final_sigma is None and sigma_schedule linear"),
        ({"decay_towards": "base"}, "weight_decay is 0"),
        ({"optimizer": "adam", "max_update_norm": 1}, "lower alpha instead"),
        ({"optimizer": "adam", "adam_betas": [0.99, 0.9]}, "larger than the square of the first"),
        ({"adam_betas": [0.9]}, "es.adam_betas"),
        ({"alpha": 1.0, "weight_decay": 2}, "give at most 1"),
        ({"step_rule": "reliability", "prompts_per_member": 3}, "prompts_per_member is 3"),
        ({"member_reuse": 0.5, "noise_reuse": 2}, "noise_reuse is 2, which has the same directions"),
        ({"member_reuse": 0.0, "optimizer": "momentum"}, "optimizer is momentum, which repeats"),
        ({"member_reuse": 1, "optimizer": "adam"}, "optimizer is adam, which repeats"),
        ({"member_reuse": 1, "sigma_schedule": "cosine", "final_sigma": 1e-4}, "sigma_schedule is cosine"),
        ({"member_reuse": 0.5, "subspaces": 4}, "subspaces is 4, which keeps members in parts"),
        ({"member_reuse": 1.5}, "es.member_reuse"),
    ],
)
def test_an_algorithm_that_would_not_be_what_was_meant_is_refused(es, words):
    assert words in refusal("es", {"iterations": 2} | es)


def test_members_of_one_forward_answer_the_same_prompts():
    tree = with_key("es.prompts_per_member", 3)
    tree["es"]["noise"], tree["rollout"]["members_per_forward"] = "low_rank", 4
    with pytest.raises(UserError, match=r"es: prompts_per_member is 3"):
        parse_config(tree, source="test")


@pytest.mark.parametrize(
    ("es", "words"),
    [
        ({"racing": True}, "es.racing: got True; give its keys, as in {rounds: 3, keep: 0.5}, or null"),
        ({"racing": {"rounds": 1}}, "es.racing.rounds: got 1; input should be greater than or equal to 2"),
        ({"racing": {"keeps": 1}}, "es.racing.keeps: unknown key; did you mean 'es.racing.keep'?"),
        ({"racing": {"keep": 0.9}, "population": 9}, "racing.keep is 0.9, which keeps all of 9 members"),
        ({"racing": {}, "population": 4, "antithetic": True}, "keeps all of 2 pairs, so nobody would"),
        ({"racing": {}, "prompts_per_member": 3}, "prompts_per_member is 3, but racing compares"),
        ({"racing": {}, "step_rule": "reliability"}, "step_rule is reliability, which measures members"),
        ({"racing": {}, "shaping": "per_prompt"}, "shaping is per_prompt, which compares the members"),
    ],
)
def test_a_race_that_would_not_be_what_was_meant_is_refused(es, words):
    assert words in refusal("es", {"iterations": 2} | es)


@pytest.mark.parametrize(("key", "value"), [("screening", {}), ("objective", "max")])
def test_a_race_takes_whole_problems_of_all_members(key, value):
    tree = with_key("es.racing", {})
    tree["task"][key] = value
    tree["rollout"] |= {"samples_per_prompt": 2, "temperature": 1.0}
    with pytest.raises(UserError, match=rf"task: {key}.*es\.racing"):
        parse_config(tree, source="test")


def test_the_step_rule_takes_several_problems():
    tree = with_key("es.step_rule", "reliability")
    tree["task"]["batch_size"] = 1
    with pytest.raises(UserError, match=r"task: batch_size is 1, but es.step_rule: reliability measures"):
        parse_config(tree, source="test")


def test_by_prompt_goes_with_rules_for_prompts():
    tree = with_key("es.shaping", "per_prompt")
    tree["task"]["on_reward_error"] = "worst"
    with pytest.raises(UserError, match=r"task: on_reward_error is worst"):
        parse_config(tree, source="test")


@settings(deadline=None)
@given(
    sigma=st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False),
    alpha=st.one_of(st.just("auto"), st.floats(1e-300, 1e300)),
    seed=st.integers(0, 2**64 - 1),
    on_error=st.one_of(st.just("exclude"), st.floats(allow_nan=False, allow_infinity=False)),
    name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20),
)
def test_a_dumped_configuration_reads_back_as_itself(sigma, alpha, seed, on_error, name):
    tree = copy.deepcopy(MINIMAL)
    tree["es"] |= {"sigma": sigma, "alpha": alpha, "seed": seed}
    tree["task"] = {"data": f"/{name}", "reward": f"{name}.py:f", "on_reward_error": on_error}
    tree["run"]["dir"] = f"/{name}"
    tree["model"]["path"] = "/model"
    config = parse_config(tree, source="test")
    assert parse_config(yaml.safe_load(dump_config(config)), source="dump") == config


def test_the_default_size_of_micro_batches_is_the_devices():
    config = parse_config(with_key("rollout.max_new_tokens", 5), source="test")
    assert config.rollout.micro_batch_size is None
    assert config.on_device("cpu").rollout.micro_batch_size == 32
    assert config.on_device("cuda").rollout.micro_batch_size == "auto"
    config = parse_config(with_key("rollout.micro_batch_size", 7), source="test")
    assert config.on_device("cuda").rollout.micro_batch_size == 7
