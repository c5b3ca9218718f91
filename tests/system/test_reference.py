"""The trainer against the plainest ES that can be written, for every option: the same bytes."""

import json
import math

import pytest
import torch

from shardes.config.schema import EsConfig
from shardes.rollout.batching import compose
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.trainer import make_training_loop
from shardes.weights.export_view import gather_centre
from tests.helpers.decoding import PAD, decoded
from tests.helpers.models import make_config, tiny_model
from tests.helpers.noise_oracle import same_bits
from tests.helpers.reference_es import ReferenceES
from tests.helpers.rewards import spread

ITERATIONS = 5
MICRO_BATCH_SIZE = 4
OPTIONS = {
    "the paper's": {},
    "antithetic": {"antithetic": True},
    "noise reuse": {"noise_reuse": 2},
    "a population that grows": {"population": {0: 3, 2: 6}},
    "own prompts": {"prompts_per_member": 4},
    "own prompts for pairs": {"prompts_per_member": 4, "antithetic": True},
    "ranks": {"shaping": "centered_rank"},
    "rewards as they are": {"shaping": "none"},
    "by prompt": {"shaping": "per_prompt"},
    "by prompt, own prompts": {"shaping": "per_prompt", "prompts_per_member": 5},
    "outliers": {"clip_shaped": 0.9},
    "signs": {"noise": "rademacher"},
    "low rank": {"noise": "low_rank", "rank": 2},
    "low rank in pairs, adam": {"noise": "low_rank", "antithetic": True, "optimizer": "adam", "alpha": 0.01},
    "parts": {"subspaces": 3},
    "parts of signs, short steps": {"subspaces": 2, "noise": "rademacher", "max_update_norm": 2.0},
    "parts in pairs, reused, momentum": {
        "subspaces": 2,
        "antithetic": True,
        "noise_reuse": 2,
        "optimizer": "momentum",
    },
    "more parts than members, adam": {"subspaces": 8, "optimizer": "adam", "alpha": 0.01},
    "linear": {"alpha_schedule": "linear"},
    "cosine": {"alpha_schedule": "cosine", "warmup_iterations": 2},
    "sigma": {"sigma_schedule": "linear", "final_sigma": 0.02, "alpha": "auto"},
    "short steps": {"max_update_norm": 2.0},
    "momentum": {"optimizer": "momentum", "momentum": 0.7, "alpha_schedule": "linear"},
    "adam": {"optimizer": "adam", "alpha": 0.01, "adam_betas": (0.8, 0.95), "adam_epsilon": 1e-3},
    "decay": {"weight_decay": 0.5},
    "anchored": {"weight_decay": 0.5, "decay_towards": "base"},
    "adamw, anchored, in pairs": {
        "optimizer": "adam",
        "alpha": 0.01,
        "weight_decay": 0.5,
        "decay_towards": "base",
        "antithetic": True,
        "noise_reuse": 3,
    },
}
OPTIONS |= {
    "members again, step rule": {"member_reuse": 0.5, "step_rule": "reliability"},
    "members again, in pairs": {"member_reuse": 0.7, "antithetic": True, "max_update_norm": 2.0},
}
NARROW = {
    "narrow": {},
    "narrow, members again": {"member_reuse": 1.0, "weight_decay": 0.5},
    "narrow, reused noise": {"noise_reuse": 2},
    "narrow, parts": {"subspaces": 3, "noise_reuse": 2},
    "narrow, momentum": {"optimizer": "momentum", "momentum": 0.5},
    "narrow, anchored": {"weight_decay": 0.5, "decay_towards": "base"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "model", tied=True)


def trained(config):
    with open_session(config) as session:
        make_training_loop(session, load_task(config.task)).train()
        return {
            shard.name: gather_centre(session.weights, shard).flatten().clone()
            for shard in session.backend.shards
        }


class DecodingES(ReferenceES):
    """By the decode loop: in bfloat16 ``generate``, which pads otherwise, takes other tokens on some CPUs."""

    def answers(self, prompts):
        tokens = self.tokenizer(prompts, add_special_tokens=False)["input_ids"]
        size, longest, found = MICRO_BATCH_SIZE, self.max_new_tokens, {}
        for batch in compose(tokens, micro_batch_size=size, pad_id=PAD, max_new_tokens=longest):
            answers = decoded(self.model, batch, max_new_tokens=longest, eos_ids=[1])
            found |= zip(batch.rows, answers, strict=True)
        rows = [found[row] for row in range(len(prompts))]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)


def compare(tmp_path, model, options, *, make_reference=ReferenceES, **changes):
    es = {"iterations": ITERATIONS, "population": 4, "sigma": 0.05, "alpha": 0.1} | options
    keys = {f"es__{key}": value for key, value in es.items()}
    config = make_config(
        tmp_path,
        model=model,
        run_dir=tmp_path / "run",
        eval__every=0,
        rollout__micro_batch_size=MICRO_BATCH_SIZE,
        **keys,
        **changes,
    )
    found = trained(config)
    rows = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    reference = make_reference(
        model,
        rows,
        spread,
        batch_size=9,
        max_new_tokens=6,
        dtype=getattr(torch, config.model.dtype),
        **dict(EsConfig(**es)),
    )
    for t in range(ITERATIONS):
        reference.iterate(t)
    updates = [
        record
        for record in map(json.loads, (tmp_path / "run" / "journal.jsonl").read_text().splitlines())
        if record["type"] == "update"
    ]
    assert all(any(update["coefficients"]) and math.isfinite(update["alpha"]) for update in updates)
    assert found.keys() == reference.masters.keys()
    for name, values in reference.masters.items():
        assert same_bits(found[name], values.to(found[name].dtype)), name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_gives_the_bytes_of_the_plain_algorithm(tmp_path, model, options):
    compare(tmp_path, model, options)


@pytest.mark.parametrize("options", NARROW.values(), ids=NARROW)
def test_narrow_masters_do_as_well(tmp_path, model, options):
    narrow = {"model__dtype": "bfloat16", "weights__master": "model"}
    compare(tmp_path, model, options, make_reference=DecodingES, **narrow)
