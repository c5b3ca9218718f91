"""Keys by their names of older versions: read as what they are now, with one warning."""

import logging

import pytest
import yaml

from shardes import TrainConfig
from shardes.config.loading import dump_config, load_config, load_run_config
from shardes.config.old_keys import apply_changes, rename_in_header
from shardes.errors import UserError
from tests.helpers.config_trees import MINIMAL
from tests.helpers.inprocess import call

# rollout.mode and members_per_forward (...: not given) as they were, and gather and members_per_forward now.
MODES = [
    ("members", ..., "iteration", 1),
    ("prompts", 16, "member", 1),
    ("stream", "auto", "layer", 1),
    ("auto", 4, "auto", 1),
    ("batched", ..., "auto", 16),
    ("batched", 4, "auto", 4),
    ("batched", "auto", "auto", "auto"),
    ("batched", 1, "auto", "auto"),
    ("batched_stream", ..., "layer", 16),
    ("batched_stream", 8, "layer", 8),
    ("batched_stream", 1, "layer", "auto"),
]
OLD_ES = {"iterations": 7, "noise": "low_rank", "schedule": "linear"}


@pytest.fixture
def read(tmp_path):
    """Read a file of the given sections, with overrides."""

    def with_overrides(sections, *overrides):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(MINIMAL | sections))
        return load_config(path, list(overrides))

    return with_overrides


def old_rollout(mode, members):
    return {"max_new_tokens": 5, "mode": mode} | ({} if members is ... else {"members_per_forward": members})


@pytest.mark.parametrize(("mode", "members", "gather", "now"), MODES)
def test_a_mode_is_what_it_was(read, mode, members, gather, now):
    config = read({"rollout": old_rollout(mode, members), "es": OLD_ES})
    assert (config.rollout.gather, config.rollout.members_per_forward) == (gather, now)
    given = [] if members is ... else [f"rollout.members_per_forward={members}"]
    assert read({"es": OLD_ES}, f"--rollout.mode={mode}", *given) == config


def test_one_warning_names_all_old_keys_and_what_they_are_now(read, caplog):
    log = {"to": ["tensorboard"]}
    for _ in range(2):  # the same file may be read twice
        config = read({"rollout": old_rollout("batched", 4), "es": OLD_ES, "log": log})
    assert (config.es.alpha_schedule, config.log.report_to) == ("linear", ["tensorboard"])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith(
        "/config.yaml: keys of an older version are read as what they are now: es.schedule is "
        "es.alpha_schedule; log.to is log.report_to; rollout.mode: batched is rollout.gather: auto and "
        "rollout.members_per_forward: 4"
    )


def test_other_ranks_and_new_keys_say_nothing(read, caplog, monkeypatch):
    read({"es": {"iterations": 7, "alpha_schedule": "linear"}}, "rollout.gather=layer", "log.report_to=[]")
    monkeypatch.setenv("RANK", "1")
    assert read({"es": OLD_ES}).es.alpha_schedule == "linear"
    assert not caplog.records


@pytest.mark.parametrize(
    ("overrides", "gather", "members", "schedule"),
    [
        # What a file says by either name makes way for an override by either name.
        (["es.alpha_schedule=cosine"], "iteration", 1, "cosine"),
        (["es.schedule=cosine"], "iteration", 1, "cosine"),
        (["rollout.gather=layer"], "layer", 1, "linear"),
        (["rollout.gather=layer", "rollout.members_per_forward=3"], "layer", 3, "linear"),
        (["rollout.members_per_forward=3"], "iteration", 3, "linear"),
        (["rollout.mode=prompts"], "member", 1, "linear"),
        (["rollout.mode=batched"], "auto", 8, "linear"),
        (["rollout.mode=batched_stream", "rollout.members_per_forward=3"], "layer", 3, "linear"),
        (["rollout.members_per_forward=3", "rollout.mode=prompts"], "member", 1, "linear"),
    ],
)
def test_an_override_by_either_name_counts(read, overrides, gather, members, schedule):
    old = {"rollout": old_rollout("members", 8), "es": OLD_ES}
    config = read(old, *overrides)
    found = config.rollout.gather, config.rollout.members_per_forward, config.es.alpha_schedule
    assert found == (gather, members, schedule)


@pytest.mark.parametrize("override", ["rollout.mode=batched", "es.schedule=cosine"])
def test_an_old_override_replaces_a_new_key(read, override):
    es = {"iterations": 7, "noise": "low_rank", "alpha_schedule": "linear"}
    config = read({"rollout": {"max_new_tokens": 5, "gather": "member"}, "es": es}, override)
    is_mode = override == "rollout.mode=batched"
    assert config.rollout.members_per_forward == (16 if is_mode else 1)
    assert (config.rollout.gather, config.es.alpha_schedule) == (
        ("auto", "linear") if is_mode else ("member", "cosine")
    )


@pytest.mark.parametrize(
    ("section", "keys", "old", "new"),
    [
        (
            "es",
            {"iterations": 7, "schedule": "linear", "alpha_schedule": "linear"},
            "schedule",
            "alpha_schedule",
        ),
        ("log", {"to": [], "report_to": []}, "to", "report_to"),
        ("rollout", {"max_new_tokens": 5, "mode": "auto", "gather": "auto"}, "mode", "gather"),
    ],
)
def test_an_old_key_and_its_new_name_are_refused_together(read, section, keys, old, new):
    words = (
        rf"{section}\.{old} is the old name of {section}\.{new}, and both are given; remove {section}\.{old}$"
    )
    with pytest.raises(UserError, match=words):
        read({section: keys})
    with pytest.raises(UserError, match=f"^the overrides: {words}"):
        read({}, *(f"{section}.{key}={keys[key]}" for key in (old, new)))
    with pytest.raises(UserError, match=f"^TrainConfig: {words}"):
        TrainConfig(**MINIMAL | {section: keys})


@pytest.mark.parametrize("mode", ["streams", None, ["stream"], "layer"])
def test_a_mode_that_never_was_is_refused(read, mode):
    with pytest.raises(UserError, match=r"rollout\.mode: got .*; it is now rollout\.gather: auto, iteration"):
        read({"rollout": old_rollout(mode, 1)})


@pytest.mark.parametrize(
    ("key", "near"), [("es.schedules", "es.alpha_schedule"), ("log.report", "log.report_to")]
)
def test_a_key_that_never_was_is_unknown(read, key, near):
    with pytest.raises(UserError, match=rf"{key}: unknown key; .*{near.partition('.')[2]}"):
        read({}, f"{key}=linear")


def test_dictionaries_and_run_directories_are_read(tmp_path, caplog):
    old = MINIMAL | {"rollout": old_rollout("batched", 1), "es": OLD_ES}
    config = TrainConfig(**old).resolve({})
    assert (config.es.alpha_schedule, config.rollout.members_per_forward) == ("linear", "auto")
    assert old["rollout"]["mode"] == "batched"  # the caller's dictionaries are left as they are
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    found = load_run_config(tmp_path, {"rollout.gather": "layer"})
    assert (found.es.alpha_schedule, found.rollout.gather) == ("linear", "layer")
    assert {record.getMessage().partition(":")[0] for record in caplog.records} == {
        "TrainConfig",
        str(tmp_path / "config.yaml"),
    }
    assert len(caplog.records) == 2
    (tmp_path / "config.yaml").write_text(dump_config(found))
    assert load_run_config(tmp_path, {}) == load_config(tmp_path / "config.yaml", [])
    assert len(caplog.records) == 2


def test_the_header_of_a_journal_is_read(caplog):
    header = {
        "settings": {"es.schedule": "linear", "es.sigma": 0.1, "rollout.members_per_forward": None},
        "config": {"rollout": {"mode": "stream", "members_per_forward": 16}, "log": {"to": []}},
    }
    rename_in_header(header)
    assert header == {
        "settings": {"es.alpha_schedule": "linear", "es.sigma": 0.1, "rollout.members_per_forward": None},
        "config": {"rollout": {"gather": "layer", "members_per_forward": 1}, "log": {"report_to": []}},
    }
    assert not caplog.records


@pytest.mark.parametrize("tree", [{}, {"es": None, "rollout": 3, "log": ["to"]}])
def test_what_is_no_section_is_left_to_the_schema(tree):
    kept = dict(tree)
    apply_changes(tree, source="test")
    assert tree == kept


def test_the_old_option_of_an_export_is_hidden_and_not_given_twice(tmp_path):
    assert "--shard-size" not in call("shardes", "export", "--help").stdout.replace("--max-shard-size", "")
    both = ["--shard-size", "1MB", "--max-shard-size", "1MB"]
    result = call("shardes", "export", tmp_path, tmp_path / "out", *both)
    assert (result.returncode, result.stderr) == (
        2,
        "Error: --shard-size is the old name of --max-shard-size, and both are given; remove it\n",
    )
