"""Kernels of attention on GPUs, and versions whose attention takes several times as long."""

import pytest
import torch
import transformers
from transformers import GPT2Config, LlamaConfig
from transformers.integrations import sdpa_attention

from shardes.rollout.build import make_evaluator
from shardes.rollout.engines.transformers.attention import warn_of_repeated_heads
from shardes.session import open_session
from shardes.tasks.loading import load_task
from tests.helpers.models import make_config, tiny_model

GROUPED = LlamaConfig(num_attention_heads=8, num_key_value_heads=2)
EVERY_HEAD = LlamaConfig(num_attention_heads=8, num_key_value_heads=8)


def test_cudnn_is_used_only_where_asked_for(tmp_path):
    model = tiny_model(tmp_path / "model", tied=True)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for changes, wanted in (({}, False), ({"rollout__cudnn_attention": True}, True)):
            torch.backends.cuda.enable_cudnn_sdp(not wanted)
            config = make_config(tmp_path, model=model, run_dir=tmp_path / "run", **changes)
            with open_session(config) as session:
                make_evaluator(session, load_task(config.task))
            assert torch.backends.cuda.cudnn_sdp_enabled() == wanted
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize(
    ("version", "model_config", "device", "is_said"),
    [
        ("5.22.0", GROUPED, "cuda", True),
        ("5.17.0.dev0", GROUPED, "cuda", True),
        ("5.23.0", GROUPED, "cuda", False),
        ("6.0.1", GROUPED, "cuda", False),
        ("5.22.0", GROUPED, "cpu", False),
        ("5.22.0", EVERY_HEAD, "cuda", False),
        ("5.22.0", GPT2Config(), "cuda", False),
    ],
)
def test_old_versions_that_repeat_heads_are_named(
    monkeypatch, caplog, version, model_config, device, is_said
):
    monkeypatch.setattr(transformers, "__version__", version)
    warn_of_repeated_heads(model_config, torch.device(device))
    assert bool(caplog.records) == is_said
    assert not is_said or f"transformers {version} repeats" in caplog.text
    assert not is_said or "pip install 'transformers>=5.23'" in caplog.text


def test_this_version_is_the_first_that_does_not():
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    assert hasattr(sdpa_attention, "pack_gqa") == (version >= (5, 23))
