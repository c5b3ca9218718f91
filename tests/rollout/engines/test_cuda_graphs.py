"""Decoding steps that are captured, with a capture that only remembers the function."""

import pytest
import torch

from shardes.rollout.batching import LEAST_PREFIX, shared_prefix
from shardes.rollout.engines.transformers.cuda_graphs import ladder
from shardes.rollout.engines.transformers.decoder import Completions, Decoder
from tests.helpers.decoding import BUDGET, EVERY, PAD, Rows, composed, generated, random_prompts


class Remembered:
    """Stands in for a CUDA graph: a replay runs the function, which reads the addresses it was given."""

    made = 0

    def __init__(self, function):
        Remembered.made += 1
        self._function = function
        function()

    def replay(self):
        self._function()


CAPTURED = [name for name in EVERY if name not in ("gemma2", "gemma3")]


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_steps_give_the_same_answers(models, name):
    model = models[name]
    decoder = Decoder(
        eos_ids=[3, 12, 9, 20, 33, 28], pad_id=PAD, max_new_tokens=BUDGET, make_graph=Remembered
    )
    Remembered.made, sizes = 0, set()
    for seed in (0, 1):
        prompts = random_prompts(seed, num_prompts=19, prefix_length=LEAST_PREFIX)
        batch = composed(prompts)
        with Rows(model) as seen:
            for prefix in (None, torch.tensor([shared_prefix(prompts)])):
                decoder.begin(model, prefix)
                assert decoder.decode(model, batch).tokens == generated(
                    model, batch, eos_ids=[3, 12, 9, 20, 33, 28]
                )
        sizes |= {rows for rows, width in seen if width == 1}
    assert sizes <= set(ladder(19))
    assert Remembered.made == len(sizes), "batches of the same sizes share what was captured"
    assert name == "gpt_neox" or len(sizes) == 2, "a shrunken batch was meant to have a step of its own"
    assert decoder._graphs.is_usable


def test_the_sizes_that_are_captured_are_halves():
    assert ladder(64) == [64, 32, 16, 8]
    assert ladder(19) == [19, 10]
    assert ladder(5) == [5]


def test_what_cannot_be_captured_is_decoded_step_by_step_with_one_warning(models, caplog):
    model, batch = models["qwen2"], composed(random_prompts(0))
    wanted = generated(model, batch, eos_ids=[3])

    def fails(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    decoder = Decoder(eos_ids=[3], pad_id=PAD, max_new_tokens=BUDGET, make_graph=fails)
    for _ in range(2):
        decoder.begin(model)
        assert decoder.decode(model, batch).tokens == wanted
    assert [record.message for record in caplog.records] == [
        "Qwen2ForCausalLM cannot be captured as a CUDA graph (RuntimeError: operation not permitted when "
        "stream is capturing), so each token is decoded kernel by kernel"
    ]


def test_a_capture_that_finds_no_memory_says_so(models):
    # As the instantiation of a graph does: no tensor was allocated.
    def fails(function):
        raise torch.AcceleratorError("CUDA error: out of memory", 2)

    decoder = Decoder(eos_ids=[3], pad_id=PAD, max_new_tokens=BUDGET, make_graph=fails)
    decoder.begin(models["qwen2"])
    with pytest.raises(torch.AcceleratorError, match="out of memory"):
        decoder.decode(models["qwen2"], composed(random_prompts(0)))


def test_a_capture_that_gives_other_logits_is_not_used(models, caplog):
    model, batch = models["qwen2"], composed(random_prompts(0))

    class Stale(Remembered):
        def replay(self):
            for parameter in model.parameters():
                parameter.data.mul_(1.5)
            self._function()
            for parameter in model.parameters():
                parameter.data.div_(1.5)

    decoder = Decoder(eos_ids=[3], pad_id=PAD, max_new_tokens=BUDGET, make_graph=Stale)
    decoder.begin(model)
    assert decoder.decode(model, batch).tokens == generated(model, batch, eos_ids=[3])
    assert "other logits" in caplog.text


def test_a_member_that_is_not_finite_does_not_spoil_the_next(models):
    model, batch = models["mistral"], composed(random_prompts(0))
    wanted = generated(model, batch, eos_ids=[3])
    for make_graph in (None, Remembered):
        decoder = Decoder(eos_ids=[3], pad_id=PAD, max_new_tokens=BUDGET, make_graph=make_graph)
        handle = model.model.layers[0].register_forward_hook(
            lambda module, args, states: states * float("nan")
        )
        decoder.begin(model)
        assert not decoder.decode(model, batch).is_finite
        handle.remove()
        assert decoder.decode(model, batch) == Completions(wanted, [True] * len(wanted))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt_neox"])
def test_captured_steps_on_a_device_give_the_models_own_tokens(models, name):
    model = models[name].to("cuda")
    try:
        batch = composed(random_prompts(0, num_prompts=19)).to("cuda")
        decoder = Decoder(eos_ids=[3, 12], pad_id=PAD, max_new_tokens=BUDGET)
        wanted = generated(model, batch, eos_ids=[3, 12])
        for _ in range(2):
            decoder.begin(model)
            assert decoder.decode(model, batch).tokens == wanted
        assert decoder._graphs.is_usable
        # A member's weights are written where the captured ones were.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
        assert decoder.decode(model, batch).tokens == generated(model, batch, eos_ids=[3, 12])
    finally:
        models[name].to("cpu")
