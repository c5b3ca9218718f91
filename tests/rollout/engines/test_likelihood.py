"""Log-likelihoods of completions in batches against each pair alone."""

import pytest
import torch

from shardes.rollout.batching import compose_likelihood_batches
from shardes.rollout.engines.transformers.likelihood import log_likelihoods
from tests.helpers.decoding import EVERY, PAD, HeadInputs, random_prompts


@pytest.mark.parametrize("name", EVERY)
def test_log_likelihoods_are_those_of_each_pair_alone(models, name):
    model = models[name]
    prompts = random_prompts(6, num_prompts=9)
    completions = random_prompts(7, num_prompts=9)[::-1]
    batches = compose_likelihood_batches(prompts, completions, micro_batch_size=4, pad_id=PAD)
    assert [len(batch.rows) for batch in batches] == [4, 4, 1]
    found = {}
    with HeadInputs(model) as seen:
        for batch in batches:
            found |= dict(zip(batch.rows, log_likelihoods(model, batch), strict=True))
    firsts = [min(batch.prompt_lengths) - 1 for batch in batches]
    assert seen == [
        (len(batch.rows), batch.input_ids.shape[1] - first)
        for batch, first in zip(batches, firsts, strict=True)
    ]
    assert any(firsts)
    assert sorted(found) == list(range(9))
    for row, scores in found.items():
        pair = prompts[row] + completions[row]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([pair])).logits[0].log_softmax(dim=-1)
        start = len(prompts[row])
        wanted = [logits[place - 1, pair[place]].item() for place in range(start, len(pair))]
        assert scores.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_a_completion_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="pair 1"):
        compose_likelihood_batches([[1], [2]], [[3], []], micro_batch_size=2, pad_id=PAD)
