"""Many members in one forward: the rewards of one by one, and the same for every way to spread the model."""

import json

import pytest
from torch import nn

from shardes.errors import UserError
from shardes.noise import LowRank
from shardes.rollout.engines.transformers import rows
from shardes.rollout.lowrank import hooks as hooks
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.trainer import make_training_loop
from tests.helpers.exports import fingerprint
from tests.helpers.inprocess import call
from tests.helpers.models import make_config, tiny_model, tree
from tests.helpers.runs import gathers_of, journal_of, run_cases, steady_metrics

# Seven members in chunks of three: the last chunk is smaller, and one rank of two has none.
BATCHED = {
    "rollout__members_per_forward": 3,
    "rollout__max_new_tokens": 12,
    "rollout__stop": ["7", "3+"],
    "es__noise": "low_rank",
    "es__rank": 2,
    "es__population": 7,
    "es__iterations": 2,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "qwen2": tiny_model(root / "qwen2", tied=True),
        "moe": tiny_model(root / "moe", tied=False, architecture="qwen2_moe"),
    }


def write_long_problems(path):
    """Prompts that begin alike, with enough tokens for a common prefix, and end differently."""
    rows = [{"prompt": "1+2+3+4+5+6+7+8+9+" + f"{i}" + "+7" * (i % 4) + "="} for i in range(11)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_choices(tmp_path):
    """A task of given completions, as changes of a configuration."""
    rows = [
        {"prompt": f"{i}+", "choices": ["3", "14+2", "9*9"], "gold": i % 3, "label": i % 3} for i in range(9)
    ]
    data = tmp_path / "choices.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task__data": data,
        "task__heldout_data": None,
        "task__reward": None,
        "task__name": "multiple_choice",
        "task__metric": "log_likelihood",
        "rollout__stop": [],
    }


def rewards(run_dir):
    return {
        (line["iteration"], line["member"]): line["reward"]
        for line in journal_of(run_dir)
        if line["type"] == "member"
    }


def train(tmp_path, model, name="run", **changes):
    """Trains in this process; returns the run directory."""
    config = make_config(tmp_path, model=model, run_dir=tmp_path / name, **(BATCHED | changes))
    with open_session(config) as session:
        make_training_loop(session, load_task(config.task)).train()
    return tmp_path / name


@pytest.mark.parametrize(
    ("architecture", "prompts"),
    [
        ("qwen2", "short"),
        ("qwen2", "with a prefix"),
        ("qwen2", "computed in parts"),
        ("moe", "with a prefix"),
    ],
)
def test_members_earn_what_they_earn_one_by_one(tmp_path, models, monkeypatch, architecture, prompts):
    changes = {"model": models[architecture]}
    if prompts != "short":
        changes["task__data"] = write_long_problems(tmp_path / "long.jsonl")
    if prompts == "computed in parts":
        monkeypatch.setattr(rows, "ROWS_PER_PART", 3)
        monkeypatch.setattr(rows, "TOKENS_PER_PART", 1)
    together = rewards(train(tmp_path, name="together", **changes))
    alone = rewards(train(tmp_path, name="alone", **changes, rollout__members_per_forward=1))
    assert len(together) == 14
    assert len(set(together.values())) > 7
    assert together == alone


def test_pairs_and_reused_directions_earn_what_they_earn_one_by_one(tmp_path, models):
    changes = {
        "model": models["qwen2"],
        "es__antithetic": True,
        "es__noise_reuse": 2,
        "es__population": {0: 6, 1: 8},
        "es__optimizer": "momentum",
        "es__iterations": 3,
    }
    together = rewards(train(tmp_path, name="together", **changes))
    alone = rewards(train(tmp_path, name="alone", **changes, rollout__members_per_forward=1))
    assert len(together) == 6 + 8 + 8
    assert len(set(together.values())) > 10
    assert together == alone


def test_given_completions_are_as_likely_as_one_by_one(tmp_path, models):
    changes = write_choices(tmp_path)
    together = rewards(train(tmp_path, models["qwen2"], "together", **changes))
    alone = rewards(train(tmp_path, models["qwen2"], "alone", **changes, rollout__members_per_forward=1))
    assert together.keys() == alone.keys()
    # One by one the weights differ in later iterations, by as little.
    assert all(abs(together[key] - alone[key]) < 1e-4 * abs(alone[key]) for key in alone)
    assert len(set(together.values())) == 14


def test_members_that_are_known_are_not_evaluated_again_and_change_nothing(tmp_path, models):
    whole = train(tmp_path, models["qwen2"], "whole")
    cut = train(tmp_path, models["qwen2"], "cut")
    lines = (cut / "journal.jsonl").read_bytes().splitlines(keepends=True)
    kinds = [json.loads(line) for line in lines]
    # Of the second iteration's seven members the first two are kept: a part of a chunk.
    (last,) = [i for i, line in enumerate(kinds) if line.get("iteration") == 1 and line.get("member") == 1]
    (cut / "journal.jsonl").write_bytes(b"".join(lines[: last + 1]))
    again = train(tmp_path, models["qwen2"], "cut")
    assert rewards(again) == rewards(whole)
    assert strip(again) == strip(whole)
    for directory in (whole, again):
        assert call("shardes", "verify", directory).returncode == 0
        spec = ("--config", directory / "config.yaml", "--model", directory, "--out", directory / "answers")
        found = call("shardes", "evaluate", *spec, "--trust-remote-code")
        assert found.returncode == 0, found.stderr
        assert call("shardes", "export", directory, directory / "export").returncode == 0
    assert fingerprint(whole / "export") == fingerprint(again / "export")


def strip(run_dir):
    """Updates and digests without what chains lines together."""
    kept = ("type", "iteration", "coefficients", "digest")
    return [
        {key: line.get(key) for key in kept}
        for line in journal_of(run_dir)
        if line["type"] in ("update", "weights")
    ]


def test_a_mode_of_the_other_kind_and_another_number_of_members_are_refused(tmp_path, models):
    run_dir = train(tmp_path, models["qwen2"])
    before = (run_dir / "journal.jsonl").read_bytes()
    for changes in ({"rollout__members_per_forward": 1}, {"rollout__members_per_forward": 4}):
        with pytest.raises(UserError, match=r"rollout\.members_per_forward: the run has 3, this conf"):
            train(tmp_path, models["qwen2"], **changes)
    train(tmp_path, models["qwen2"], rollout__gather="layer")
    assert (run_dir / "journal.jsonl").read_bytes() == before


def test_auto_is_found_once_and_kept(tmp_path, models, monkeypatch):
    run_dir = train(tmp_path, models["qwen2"], rollout__members_per_forward="auto")
    header = journal_of(run_dir)[0]
    assert header["settings"]["rollout.members_per_forward"] == 8  # what holds seven
    monkeypatch.setattr("shardes.rollout.autotune.MOST_MEMBERS", 2)
    train(tmp_path, models["qwen2"], rollout__members_per_forward="auto")
    both = {"rollout__members_per_forward": "auto", "rollout__micro_batch_size": "auto"}
    settings = journal_of(train(tmp_path, models["qwen2"], "both", **both))[0]["settings"]
    assert settings["rollout.members_per_forward"] == 2
    assert settings["rollout.micro_batch_size"] == 9


# The check at the start, and what there is no rule for.


# What norms and embeddings add in this model is hidden by the rounding of bfloat16.
@pytest.mark.parametrize(
    ("broken", "dtype"),
    [
        ("_linear", "float32"),
        ("_linear", "bfloat16"),
        ("_embedding", "float32"),
        ("_rms_norm", "float32"),
    ],
)
def test_a_wrong_rule_is_caught_before_the_first_iteration(tmp_path, models, monkeypatch, broken, dtype):
    right = getattr(hooks.LowRankHooks, broken)

    def wrong(self, module, x, out, names):
        return 2 * out - right(self, module, x, out, names)

    monkeypatch.setattr(hooks.LowRankHooks, broken, wrong)
    with pytest.raises(
        UserError, match=r"rollout\.members_per_forward: forwards of many members compute other logits"
    ):
        train(tmp_path, models["qwen2"], model__dtype=dtype)
    assert not (tmp_path / "run" / "journal.jsonl").exists()


def test_a_right_rule_passes_in_every_dtype(tmp_path, models):
    for dtype in ("bfloat16", "float16"):
        assert rewards(train(tmp_path, models["qwen2"], dtype, model__dtype=dtype, es__iterations=1))


def test_a_parameter_without_a_rule_is_named_unless_it_is_frozen(tmp_path, models, monkeypatch):
    rule = hooks.LowRankHooks._rule
    monkeypatch.setattr(
        hooks.LowRankHooks,
        "_rule",
        lambda self, module: None if isinstance(module, nn.Embedding) else rule(self, module),
    )
    with pytest.raises(
        UserError,
        match=r"model\.embed_tokens\.weight is a parameter of model\.embed_tokens, a Embedding, for",
    ):
        train(tmp_path, models["moe"])
    train(tmp_path, models["moe"], "frozen", es__trainable=[".*", "!.*embed.*"])


def test_a_parameter_of_more_dimensions_is_named(tmp_path, models, monkeypatch):
    def refuse(self, shape):
        raise ValueError(f"no rule for {list(shape)}")

    monkeypatch.setattr(LowRank, "check_shape", refuse)
    with pytest.raises(UserError, match=r"es\.noise: .*: no rule for \[.*freeze it \(es\.trainable"):
        train(tmp_path, models["qwen2"])


def test_logits_that_are_not_finite_are_one_members_alone(tmp_path, models, monkeypatch):
    load = hooks.LowRankHooks.load

    def damaging(self, members):
        load(self, members)
        for place, member in enumerate(members):
            if member.direction == 4:
                self._vectors["model.norm.weight"][place] = float("nan")

    monkeypatch.setattr(hooks.LowRankHooks, "load", damaging)
    found = rewards(train(tmp_path, models["qwen2"], es__iterations=1))
    assert [member for (_, member), reward in found.items() if reward is None] == [4]


# Every way to spread the model.


def spread_trees(tmp_path, model, name, cases):
    return [
        tree(tmp_path, model=model, run_dir=tmp_path / f"run-{name}-{i}", **(BATCHED | case))
        for i, case in enumerate(cases)
    ]


@pytest.fixture(scope="module")
def oracle(models, tmp_path_factory):
    """One process: exported bytes and metrics."""
    root = tmp_path_factory.mktemp("oracle")
    data = write_long_problems(root / "long.jsonl")
    (prints,) = run_cases(
        root, "oracle", spread_trees(root, models["qwen2"], "oracle", [{"task__data": data}]), 1
    )
    return data, prints, steady_metrics(root / "run-oracle-0")


def check_spread(tmp_path, models, oracle, *, world_size, cases, shortages=None):
    """Trains every case on as many ranks; ``shortages`` says, by case, where memory runs out."""
    data, prints, metrics = oracle
    shortages = shortages or {}
    trees = spread_trees(tmp_path, models["qwen2"], "spread", [case | {"task__data": data} for case in cases])
    found = run_cases(tmp_path, "spread", trees, world_size, shortages)
    for i, case in enumerate(cases):
        assert found[i] == prints, case
        assert steady_metrics(tmp_path / f"run-spread-{i}") == metrics, case
        used = "layer" if i in shortages else case.get("rollout__gather", "iteration")
        assert set(gathers_of(tmp_path / f"run-spread-{i}")) == {used}


@pytest.mark.slow
def test_two_ranks_give_the_bytes_of_one(tmp_path, models, oracle):
    cases = [
        {"parallel__backend": "fsdp"},
        {"parallel__backend": "fsdp", "rollout__gather": "layer"},
        {"parallel__backend": "zero3", "rollout__gather": "layer"},
        # In the first chunks of the first iteration, on one rank.
        {"parallel__backend": "zero3"},
    ]
    check_spread(tmp_path, models, oracle, world_size=2, cases=cases, shortages={3: [["decode", 1, 2]]})


def check_split(tmp_path, model, *, world_size, **changes):
    """Trains by tensor parallelism, whose forwards add up in another order, and in one process."""
    alone = rewards(train(tmp_path, model, "alone", es__iterations=1, **changes))
    cases = [
        {},
        {"rollout__gather": "layer", "parallel__shard_size": 2},
    ]
    common = {"parallel__backend": "tensor_parallel", "es__iterations": 1} | changes
    trees = spread_trees(tmp_path, model, "split", [common | case for case in cases])
    run_cases(tmp_path, "split", trees, world_size)
    for i in range(len(cases)):
        run_dir = tmp_path / f"run-split-{i}"
        assert rewards(run_dir) == pytest.approx(alone, rel=1e-4)
        assert set(gathers_of(run_dir)) == {"layer"}


@pytest.mark.slow
@pytest.mark.parametrize("answers", ["generated", "given"])
def test_ranks_that_split_layers_earn_what_one_does(tmp_path, answers):
    model = tiny_model(tmp_path / "model", tied=True, num_heads=2, num_kv_heads=2)
    changes = write_choices(tmp_path) if answers == "given" else {}
    check_split(tmp_path, model, world_size=2, **changes)


@pytest.mark.exhaustive
@pytest.mark.parametrize("tied", [True, False])
def test_replicas_of_ranks_that_split_layers_earn_what_one_does(tmp_path, tied):
    model = tiny_model(tmp_path / "model", tied=tied, num_heads=4, num_kv_heads=4)
    check_split(tmp_path, model, world_size=4, **write_choices(tmp_path))


@pytest.mark.exhaustive
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_ranks_and_any_mesh_give_the_bytes_of_one(tmp_path, models, oracle, world_size):
    cases = [
        {"parallel__backend": backend, "rollout__gather": mode}
        for backend in ("fsdp", "zero3", "single")
        for mode in ("iteration", "layer")
    ]
    if world_size == 4:
        cases += [
            {"parallel__backend": backend, "rollout__gather": mode, "parallel__shard_size": 2}
            for backend in ("fsdp", "zero3")
            for mode in ("iteration", "layer")
        ]
    check_spread(tmp_path, models, oracle, world_size=world_size, cases=cases)
