"""Members as terms of layers' outputs: against the same members as weights, for every architecture."""

import pytest
import torch
from transformers import GPT2Config

from shardes.es.perturbation import Perturbation
from shardes.rollout.terms import MemberTerms
from shardes.session import open_session
from tests.helpers.models import ARCHITECTURES, make_config, tiny_model

MEMBERS = [Perturbation(0, 0, 0.02), Perturbation(0, 3, -0.02), Perturbation(5, 0, 0.01)]
IDS = torch.arange(1, 22).view(3, 7)


@torch.no_grad()
def compare(tmp_path, model, *, rank, dtype="float32", **changes):
    """The largest difference of logits, and the size of what the perturbations do to them."""
    config = make_config(
        tmp_path,
        model=model,
        run_dir=tmp_path / "run",
        es__noise="low_rank",
        es__rank=rank,
        model__dtype=dtype,
        **changes,
    )
    with open_session(config) as session:
        weights, whole = session.weights, session.backend.lockstep_model
        centre = whole(IDS).logits.clone()
        wanted = []
        for member in MEMBERS:
            weights.perturb(**vars(member))
            wanted.append(whole(IDS).logits.clone())
        weights.centre()
        terms = MemberTerms(session.backend, weights)
        terms.load(MEMBERS)
        rows = torch.arange(9)
        found = torch.empty(9, *centre.shape[1:], dtype=centre.dtype)
        order = torch.tensor([4, 0, 8, 3, 7, 1, 2, 6, 5])  # as after rows were compacted
        with terms.on(whole):
            terms.on_rows(rows[order])
            found[order] = whole(IDS.repeat_interleave(3, 0)[order]).logits
        assert torch.equal(whole(IDS).logits, centre)
        wanted = torch.stack(wanted, dim=1).flatten(0, 1)
        effects = wanted - centre.repeat_interleave(3, 0)
        return (found - wanted).abs().max().item(), effects.abs().mean().item()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_terms_give_the_logits_of_perturbed_weights(architecture, tied, tmp_path):
    model = tiny_model(tmp_path / "model", tied=tied, architecture=architecture)
    error, effect = compare(tmp_path, model, rank=1 + tied)
    assert effect > 0.05
    assert error < 2e-4 * effect


def test_a_convolution_of_width_one_is_a_matrix_the_other_way_round(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "gpt2", (GPT2Config, {"n_embd": 66, "n_layer": 2, "n_head": 3}))
    model = tiny_model(tmp_path / "model", tied=True, architecture="gpt2")
    error, effect = compare(tmp_path, model, rank=2)
    assert error < 2e-4 * effect


@pytest.mark.parametrize("trainable", [".*proj.*", ".*bias", ".*norm.*", ".*embed.*"])
def test_frozen_parameters_have_no_terms(tmp_path, trainable):
    model = tiny_model(tmp_path / "model", tied=False, architecture="llama")
    error, effect = compare(tmp_path, model, rank=1, es__trainable=[trainable])
    assert effect > 0
    assert error < 1e-3 * effect
