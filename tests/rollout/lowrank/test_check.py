"""The check at the start of a run whose members share forwards: what it asks, and what it allows."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2ForCausalLM

from shardes.errors import UserError
from shardes.rollout.lowrank.check import check_agreement
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.trainer import make_training_loop
from tests.helpers.models import make_config, tiny_model


def agreement(*, error, rounding):
    """Compare members whose perturbation changes logits by 1."""
    centre = torch.zeros(1, 4, dtype=torch.float64)
    wanted = centre + 1
    check_agreement(
        wanted + error,
        wanted=wanted,
        centre=centre,
        dtype=torch.float32,
        world=SimpleNamespace(any=bool),
        what="logits",
        rounding=rounding,
    )


def test_a_difference_is_allowed_as_far_as_rounding_was_seen_to_reach():
    agreement(error=0.0009, rounding=0.0)
    agreement(error=0.01, rounding=0.005)
    for rounding in (0.0, 0.004):
        with pytest.raises(UserError, match=r"differ by 0\.01 "):
            agreement(error=0.01, rounding=rounding)
    with pytest.raises(UserError):
        agreement(error=float("nan"), rounding=1.0)


def test_tokens_of_all_the_vocabulary_are_asked(tmp_path, monkeypatch):
    asked, forward = [], Qwen2ForCausalLM.forward

    def spy(self, **inputs):
        asked.append(inputs["input_ids"].clone())
        return forward(self, **inputs)

    model = tiny_model(tmp_path / "model", tied=True)
    config = make_config(
        tmp_path,
        model=model,
        run_dir=tmp_path / "run",
        es__noise="low_rank",
        es__iterations=1,
        rollout__members_per_forward=2,
    )
    with open_session(config) as session:
        monkeypatch.setattr(Qwen2ForCausalLM, "forward", spy)
        make_training_loop(session, load_task(config.task))
        vocabulary = session.backend.sharded_model.config.vocab_size
    # Two members and the one next to the first, the centre, and the two members in one forward.
    assert [len(ids) for ids in asked[:5]] == [1, 1, 1, 1, 2]
    wanted = [(i + 1) * vocabulary // 17 for i in range(16)]
    assert all(ids.tolist() == [wanted] * len(ids) for ids in asked[:5])
