"""Which keys a run may change when it goes on, and which it may not."""

import pytest

from shardes.config import fingerprint
from shardes.config.loading import parse_config
from shardes.config.schema import Config
from tests.helpers.config_trees import with_key

FREE = [
    ("eval.sets", {"other": {"name": "countdown", "data": "other.jsonl"}}),
    ("eval.save_best", True),
    ("eval.pass_reward", 0.5),
    ("task.reward_timeout_seconds", 5.0),
    ("task.reward_workers", 0),
    ("task.reward_memory_bytes", None),
    ("task.reward_isolation", "none"),
    ("model.path", "elsewhere"),
    ("model.revision", "v1"),
    ("model.trust_remote_code", True),
    ("run.dir", "other"),
    ("run.resume", "never"),
    ("run.resume_engine", "any"),
    ("run.stop_seconds", 5),
    ("run.check_every", 5),
    ("run.snapshot_every", 5),
    ("run.keep_snapshots", 3),
    ("parallel.backend", "single"),
    ("parallel.shard_size", 2),
    ("parallel.deepspeed", "ds.json"),
    ("parallel.timeout_seconds", 5),
    ("parallel.threads_per_rank", 2),
    ("rollout.gather", "layer"),
    ("weights.master_device", "cpu"),
    ("eval.every", 3),
    ("log.samples_every", 3),
    ("log.instruments_every", 3),
    ("log.kl_every", 3),
    ("log.kl_prompts", 3),
    ("log.report_to", ["tensorboard"]),
    ("es.iterations", 9),
    ("es.min_valid_fraction", 0.25),
    ("es.alpha", 5e-4),  # what auto stands for
    ("task.heldout_data", "held.jsonl"),
    ("task.columns", {"numbers": "cards"}),  # what it makes of the rows is compared, as for the next two
    ("task.heldout_fraction", 0.5),
    ("task.split_seed", 1),
    ("task.on_prompt_error", "exclude"),
    ("task.date", "2024-07-26"),  # the one that prompts have is compared
]


BINDING = [
    ("task.rewards", [{"path": "m:f", "weight": 0.5}]),
    ("task.metric", "accuracy"),
    ("model.dtype", "float32"),
    ("rollout.micro_batch_size", 3),
    ("rollout.max_new_tokens", 6),
    ("rollout.stop", ["."]),
    ("rollout.skip_special_tokens", False),
    ("rollout.temperature", 0.7),
    ("rollout.top_k", 5),
    ("rollout.top_p", 0.9),
    ("rollout.samples_per_prompt", 2),
    ("weights.master", "model"),
    ("es.seed", 1),
    ("es.noise", "rademacher"),
    ("es.rank", 3),
    ("es.population", 31),
    ("es.sigma", 2e-3),
    ("es.alpha", 6e-4),
    ("es.alpha_schedule", "linear"),
    ("es.warmup_iterations", 2),
    ("es.antithetic", True),
    ("es.subspaces", 4),
    ("es.noise_reuse", 2),
    ("es.population", {0: 8, 10: 16}),
    ("es.prompts_per_member", 3),
    ("es.racing", {"rounds": 4}),
    ("es.sigma_schedule", "linear"),
    ("es.final_sigma", 1e-4),
    ("es.shaping", "centered_rank"),
    ("es.clip_shaped", 2.0),
    ("es.optimizer", "adam"),
    ("es.momentum", 0.5),
    ("es.adam_betas", [0.8, 0.99]),
    ("es.adam_epsilon", 1e-6),
    ("es.weight_decay", 0.1),
    ("es.decay_towards", "base"),
    ("es.max_update_norm", 1.0),
    ("es.step_rule", "reliability"),
    ("es.member_reuse", 0.5),
    ("es.trainable", [".*", "!.*norm.*"]),
    ("task.name", "countdown_short"),
    ("task.batch_size", 4),
    ("task.sampling", "epochs"),
    ("task.template", "{{ numbers }}"),
    ("task.system", "Be brief."),
    ("task.on_reward_error", 0.0),
    ("task.chat_template", "tool_use"),
    ("task.template_arguments", {"enable_thinking": False}),
    ("task.screening", {}),
    ("task.objective", "max"),
]
# Of these, journals of older versions have none, so they are absent where they mean what those did.
LATER = {
    *("rollout.skip_special_tokens", "task.chat_template", "task.template_arguments"),
    *("task.screening", "task.objective"),
    *("es.step_rule", "es.member_reuse", "es.racing", "es.subspaces"),
}

# Keys without which a key would do nothing, and is refused.
NEEDED = {
    "es.subspaces": {"noise": "gaussian"},
    "es.sigma_schedule": {"sigma_schedule": "cosine", "final_sigma": 1e-5},
    "es.final_sigma": {"sigma_schedule": "cosine", "final_sigma": 1e-5},
    "es.momentum": {"optimizer": "momentum"},
    "es.adam_betas": {"optimizer": "adam"},
    "es.adam_epsilon": {"optimizer": "adam"},
    "es.decay_towards": {"weight_decay": 0.5},
}


@pytest.fixture
def resume_fingerprint():
    def of(key="es.iterations", value=7, *, data_sha256="of the rows", needed_for=None):
        tree = with_key(key, value)
        tree["rollout"].setdefault("temperature", 0.5)  # what is drawn depends on more keys
        if needed_for == "task.objective":
            tree["rollout"]["samples_per_prompt"] = 2
        tree["es"] = NEEDED.get(needed_for, {}) | tree["es"]
        tree["es"].setdefault("noise", "low_rank")  # so does this
        return fingerprint.resume_fingerprint(parse_config(tree, source="test"), data_sha256=data_sha256)

    return of


@pytest.mark.parametrize(("key", "value"), FREE)
def test_a_resume_may_change(resume_fingerprint, key, value):
    assert resume_fingerprint(key, value) == resume_fingerprint()


@pytest.mark.parametrize(("key", "value"), BINDING)
def test_a_resume_may_not_change(resume_fingerprint, key, value):
    changed = resume_fingerprint(key, value, needed_for=key)
    assert changed[key] != resume_fingerprint(needed_for=key).get(key)


def test_every_key_is_known_to_be_free_or_binding(resume_fingerprint):
    every = {f"{s}.{k}" for s, field in Config.model_fields.items() for k in field.annotation.model_fields}
    judged = {key for key, _ in FREE + BINDING}
    assert every - judged == {
        "task.data",  # by content
        "task.reward",  # by the user's own care
        "task.label_words",  # of tasks that the minimal configuration does not name; see below
        "rollout.members_per_forward",  # where it is not 1; see below
        "rollout.cudnn_attention",  # where it is set; see below
        "rollout.engine",  # the journal says from where on a run has another, see tests/rollout/engines
        "rollout.kv_cache_gib",  # of another engine, as are the next two; see below
        "rollout.batch_invariant",
        "rollout.vllm",
        *("rollout.max_context", "task.environment", "task.environment_arguments"),  # of episodes; see below
        *("task.tools", "task.harness", "task.episode_return", "task.max_turns"),
    }
    others = {"task.label_words", "task.data sha256", "rollout.members_per_forward"}
    assert set(resume_fingerprint()) == {key for key, _ in BINDING} - LATER | others


@pytest.mark.parametrize(
    "changes",
    [
        {"task.environment": "games.py:Other"},
        {"task.environment_arguments": {"size": 3}},
        {"task.tools": ["tools.py:add"]},
        {"task.environment": None, "task.harness": "agent.py:run"},
        {"task.episode_return": "last"},
        {"task.max_turns": 3},
        {"rollout.max_context": 64},
    ],
)
def test_what_episodes_are_binds(changes):
    def of(changes):
        tree = with_key("task.name", ...)
        tree["task"]["environment"] = "games.py:Game"
        for key, value in changes.items():
            section, name = key.split(".")
            tree[section][name] = value
        return fingerprint.resume_fingerprint(parse_config(tree, source="test"), data_sha256="of the rows")

    plain, changed = of({}), of(changes)
    wanted = {*changes} | ({"task.reward_workers"} if "task.harness" in changes else set())
    assert {key for key in plain.keys() | changed.keys() if plain.get(key) != changed.get(key)} == wanted


def test_the_processes_of_a_harness_bind():
    def of(workers, **task):
        tree = with_key("task.name", ...)
        tree["task"] |= {"reward_workers": workers, **task}
        return fingerprint.resume_fingerprint(parse_config(tree, source="test"), data_sha256="of the rows")

    assert of(2, harness="agent.py:run") != of(4, harness="agent.py:run")
    assert of(2, environment="verifiers:sums") != of(4, environment="verifiers:sums")
    assert of(2, environment="games.py:Game") == of(4, environment="games.py:Game")


def test_memory_and_arguments_of_an_engine_are_free(resume_fingerprint):
    def of(**rollout):
        tree = with_key("parallel.backend", "vllm")
        tree["rollout"] |= rollout
        return fingerprint.resume_fingerprint(parse_config(tree, source="test"), data_sha256="of the rows")

    assert of() == of(kv_cache_gib=2.0) == of(vllm={"max_num_seqs": 8}) == of(batch_invariant=True)


def test_the_members_of_a_forward_bind_where_there_are_several(resume_fingerprint):
    def members(**rollout):
        found = resume_fingerprint("rollout", {"max_new_tokens": 5} | rollout)
        return found["rollout.members_per_forward"]

    assert members() is members(members_per_forward=1) is members(gather="layer") is None
    assert members(members_per_forward=4) == members(members_per_forward=4, gather="layer") == 4
    # What is still auto when a run begins has found memory for one.
    assert members(members_per_forward="auto") == 1


def test_kernels_of_attention_bind_where_they_are_not_the_usual_ones(resume_fingerprint):
    key = "rollout.cudnn_attention"
    assert key not in resume_fingerprint(), "older journals do not have it"
    assert resume_fingerprint(key, True)[key] is True


def test_label_words_bind(resume_fingerprint):
    task = {"name": "sst2", "data": "d", "label_words": ["bad", "good"]}
    assert resume_fingerprint("task", task) != resume_fingerprint(
        "task", task | {"label_words": ["awful", "good"]}
    )


def test_data_bind_by_content_and_iterations_only_under_a_linear_schedule(resume_fingerprint):
    assert resume_fingerprint("task.data", "another/place.csv") == resume_fingerprint()
    assert resume_fingerprint()["task.data sha256"] == "of the rows"
    assert resume_fingerprint(data_sha256="of others") != resume_fingerprint()
    es = {"alpha_schedule": "linear", "iterations": 7}
    assert resume_fingerprint("es", es) != resume_fingerprint("es", es | {"iterations": 8})
