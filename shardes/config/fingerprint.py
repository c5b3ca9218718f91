"""Keys that decide a run's result, which a resumed run must share with its journal."""

from typing import Any

from shardes.config.schema import Config
from shardes.rollout.engines.registry import DEFAULT_ENGINE

# Sections and keys that a resumed run may change: by them results stay the same, or are compared otherwise.
_FREE_SECTIONS = ("run.", "parallel.", "eval.", "log.")
_FREE_KEYS = {
    "model.path",
    "model.revision",  # which commit it is, is compared before anything is fetched
    "model.trust_remote_code",
    "rollout.gather",
    "rollout.kv_cache_gib",
    "rollout.batch_invariant",
    "rollout.vllm",
    "weights.master_device",
    "es.min_valid_fraction",
    "task.data",
    "task.columns",
    "task.heldout_data",
    "task.heldout_fraction",
    "task.split_seed",
    "task.reward",
    "task.on_prompt_error",
    "task.date",  # by what it is settled to
    "task.reward_timeout_seconds",
    "task.reward_workers",
    "task.reward_memory_bytes",
    "task.reward_isolation",
}
# Keys that journals of older versions do not have: absent where they mean what those did.
_LATER_KEYS = {
    "rollout.engine": DEFAULT_ENGINE,
    "rollout.cudnn_attention": False,
    "es.subspaces": 1,
    "rollout.skip_special_tokens": True,
    "task.chat_template": None,
    "task.template_arguments": {},
    "rollout.max_context": None,
    "task.environment": None,
    "task.environment_arguments": {},
    "task.tools": [],
    "task.harness": None,
    "task.episode_return": "sum",
    "task.max_turns": 10,
    "es.racing": None,
    "task.screening": None,
    "task.objective": "mean",
    "es.step_rule": "none",
    "es.member_reuse": None,
}


def resume_fingerprint(
    config: Config, *, data_sha256: str, prompts_sha256: str | None = None, date: str | None = None
) -> dict[str, Any]:
    """Return the keys that decide the result, by dotted name, with JSON-able values.

    Args:
        config: The configuration, in which ``auto`` has been replaced where a run finds numbers for it.
        data_sha256: A hash of the training rows as they were read: the same problems may come from another
            file or format.
        prompts_sha256: A hash of the tokens of their prompts; None: it is not known.
        date: The date that prompts depend on; None if they depend on none.
    """
    flat = {
        f"{section}.{key}": value
        for section, keys in config.model_dump(mode="json").items()
        for key, value in keys.items()
    }
    es, rollout = config.es, config.rollout
    kept = {k: v for k, v in flat.items() if k not in _FREE_KEYS and not k.startswith(_FREE_SECTIONS)}
    if es.alpha_schedule == es.sigma_schedule == "constant":
        del kept["es.iterations"]
    if es.sigma_schedule == "constant":
        kept["es.alpha"] = es.alpha_at(es.sigma)
    # Settled runs have a number; ``auto`` is left where there was memory for no more than one.
    if not rollout.is_batched:
        kept["rollout.members_per_forward"] = None
    elif rollout.members_per_forward == "auto":
        kept["rollout.members_per_forward"] = 1
    if config.task.has_harness:  # which episodes are answered together depends on it
        kept["task.reward_workers"] = config.task.reward_workers
    for key, default in _LATER_KEYS.items():
        if kept[key] == default:
            del kept[key]
    kept["task.data sha256"] = data_sha256
    found = {"task.prompts sha256": prompts_sha256, "task.date": date}
    return kept | {key: value for key, value in found.items() if value is not None}
