"""The quickstart with vLLM: its model, and that it learns what the journal says elsewhere, too."""

import json

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.models import QUICKSTART
from tests.helpers.ranks import ROOT, run_ranks

CONFIG = ROOT / "configs" / "vllm" / "quickstart.yaml"
MODEL = ROOT / "configs" / "vllm" / "quickstart" / "model"


def test_the_model_is_the_quickstarts_with_heads_of_32_elements():
    model, other = (AutoModelForCausalLM.from_pretrained(path) for path in (MODEL, QUICKSTART / "model"))
    config = model.config
    assert config.hidden_size // config.num_attention_heads == 32
    shapes = [{name: p.shape for name, p in each.named_parameters()} for each in (model, other)]
    assert shapes[0] == shapes[1]
    name = "tokenizer.json"
    assert (MODEL / name).read_bytes() == (QUICKSTART / "model" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_it_learns_and_its_journal_is_replayed_elsewhere(tmp_path):
    pytest.importorskip("vllm")
    pytest.importorskip("deepspeed")
    command = [ROOT / "launch" / "train.py", "--config", CONFIG, f"run.dir={tmp_path / 'run'}"]
    run_ranks(command, world_size=2, log_dir=tmp_path / "logs", timeout_seconds=1500)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    curve = [line["heldout_reward"] for line in lines if line.get("heldout_reward") is not None]
    assert curve[0] < 0.02
    assert curve[-1] > 0.5
    for backend, world_size in {"single": 1, "zero3": 2}.items():
        verify = ["-m", "shardes", "verify", tmp_path / "run", "--backend", backend]
        output = run_ranks(verify, world_size=world_size, log_dir=tmp_path / backend)
        assert "60 iterations replayed, 61 digests compared" in output
        assert "all is as it should be" in output
