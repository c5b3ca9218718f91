"""Tiny models of every architecture, and their answers by transformers and by the decode loop."""

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from shardes.rollout.batching import compose
from shardes.rollout.engines.transformers.decoder import Decoder
from tests.helpers.models import ARCHITECTURES, tiny_model

PAD = 0
BUDGET = 20
VOCABULARY = 37
EVERY = [*ARCHITECTURES, "gpt2"]


def load_models(root):
    """One of each architecture, ready to answer."""
    loaded = {}
    for i, name in enumerate(ARCHITECTURES):
        path = tiny_model(root / name, tied=name in ("qwen2", "phi3"), architecture=name, seed=i)
        loaded[name] = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(2)
    # Learned positions: unlike rotary ones, they tell a shifted row from one that is not.
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY}
    config = GPT2Config(**sizes, initializer_range=0.5, bos_token_id=None, eos_token_id=1)
    loaded["gpt2"] = AutoModelForCausalLM.from_config(config)
    return {name: model.eval() for name, model in loaded.items()}


def random_prompts(seed, *, num_prompts=13, prefix_length=0):
    generator = torch.Generator().manual_seed(seed)

    def some(count):
        return torch.randint(2, VOCABULARY, (count,), generator=generator).tolist()

    prefix = some(prefix_length)
    return [prefix + some(1 + (5 * i) % 9) for i in range(num_prompts)]


def composed(prompts, *, max_new_tokens=BUDGET, max_positions=None):
    (batch,) = compose(
        prompts,
        micro_batch_size=len(prompts),
        pad_id=PAD,
        max_new_tokens=max_new_tokens,
        max_positions=max_positions,
    )
    return batch


def generated(model, batch, *, max_new_tokens=BUDGET, eos_ids=()):
    """What transformers generates for a batch, each answer up to its end."""
    output = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=PAD,
    )[:, batch.input_ids.shape[1] :]
    ends = [[i for i, token in enumerate(row) if token in eos_ids] for row in output.tolist()]
    return [row[: end[0] + 1] if end else row for row, end in zip(output.tolist(), ends, strict=True)]


def decoded(model, batch, *, max_new_tokens=BUDGET, eos_ids=(), prefix=(), any_rank=None, **arguments):
    decoder = Decoder(eos_ids=eos_ids, pad_id=PAD, max_new_tokens=max_new_tokens, **arguments)
    decoder.begin(model, torch.tensor([prefix]) if prefix else None)
    return decoder.decode(model, batch, any_rank=any_rank).tokens


class Remembered:
    """Stands in for a CUDA graph: a replay runs the function, which reads the addresses it was given."""

    made = 0

    def __init__(self, function):
        Remembered.made += 1
        self._function = function
        function()

    def replay(self):
        self._function()


class Rows:
    """Counts the rows of every forward of a model."""

    def __init__(self, model):
        self.seen = []
        self._handle = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module, args, keywords):
        self.seen.append(tuple(keywords["input_ids"].shape))

    def __enter__(self):
        return self.seen

    def __exit__(self, *_):
        self._handle.remove()


class HeadInputs:
    """Sees what the head of a model multiplies: [rows, positions] of each time, all in one piece."""

    def __init__(self, model):
        self.seen = []
        self._handle = model.get_output_embeddings().register_forward_pre_hook(self._look)

    def _look(self, module, args):
        # What is in pieces is multiplied by a head of its own for each row.
        assert args[0].is_contiguous()
        self.seen.append(tuple(args[0].shape[:2]))

    def __enter__(self):
        return self.seen

    def __exit__(self, *_):
        self._handle.remove()
