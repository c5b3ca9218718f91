"""Members as terms against members as weights; on every rank of a job: python terms_checks.py CASES.json.

A case is a configuration and whether terms of its model are refused; what all of them found is printed.
"""

import json
import os
import sys
from pathlib import Path

import torch

from shardes.config.loading import parse_config
from shardes.errors import UserError
from shardes.es.update import Perturbation
from shardes.rollout.lowrank.hooks import LowRankHooks
from shardes.session import open_session
from tests.helpers.one_store import make_store

MEMBERS = [Perturbation(0, 0, 0.02), Perturbation(0, 3, -0.02), Perturbation(5, 0, 0.01)]
IDS = torch.arange(1, 22).view(3, 7)


@torch.no_grad()
def compare(session):
    """The largest difference of logits, and the size of what the perturbations do to them."""
    weights, whole = session.weights, session.backend.sharded_model
    centre = whole(IDS).logits.clone()
    wanted = []
    for member in MEMBERS:
        weights.perturb(member)
        wanted.append(whole(IDS).logits.clone())
    weights.centre()
    terms = LowRankHooks(session.backend, weights)
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


def main():
    _store = make_store()
    for case in json.loads(Path(sys.argv[1]).read_text()):
        config = parse_config(case["config"], source="case")
        with open_session(config) as session:
            try:
                error, effect = compare(session)
            except UserError as refusal:
                assert case["is_refused"], refusal
                sys.stdout.write(f"{refusal}\n")
            else:
                assert not case["is_refused"]
                assert effect > 0.05, effect
                assert error < 5e-4 * effect, (config.model.path, error, effect)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as shardes.cli.main does, and for the same reason
