"""The checks that take GPUs: both are rehearsed, and what they say of parts that fail is as it was."""

import importlib
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.ranks import ROOT, environment, nursery

PAGE = ROOT / "docs" / "gpu_check.md"
CHECKS = ("gpu", "multi_gpu")


@pytest.fixture(scope="module")
def modules():
    """Modules of the package by name; they are found only while this file's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("tools/bench", "tools"):
            patch.syspath_prepend(str(ROOT / folder))
        yield {
            name: importlib.import_module(f"gpu_check.{name}")
            for name in ("registry", "report", "cli", "part", "random_model")
        }


def read(path):
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_every_part_is_rehearsed(check, modules, tmp_path):
    arguments = [ROOT / "tools" / "gpu_check", "--check", check, "--rehearse", "--out", tmp_path]
    process = nursery().start(arguments, env=environment(), log=tmp_path / "log")
    try:
        status = process.wait(280)
    finally:
        process.kill_group()
    output = (tmp_path / "log").read_text()
    assert status == 0, output
    found = read(tmp_path / f"{check.replace('_', '-')}-rehearsal.json")
    assert found["schema"] == modules["report"].SCHEMA
    assert found["is_rehearsal"]
    parts = found["parts"]
    assert list(parts) == [part.name for part in modules["registry"].CHECKS[check]]
    packages = {"vllm": "vllm", "kernels": "triton"}
    lacking = {part for part, package in packages.items() if not modules["part"].is_installed(package)}
    for name, part in parts.items():
        assert part["status"] == ("skipped" if name in lacking else "passed"), output
        assert name in lacking or part["values"] or part["checks"], name
    # What pages quote.
    names = re.findall(r"`(\w+)`", PAGE.read_text().partition("Figures of `decode`")[2].partition("##")[0])
    shown = {name for name in names if not name.startswith("peak") and name not in ("gathers", "gather")}
    if check == "gpu":
        assert len(shown) > 15
        assert shown - {"tensor_parallel"} <= set(parts["decode"]["values"])


def test_the_page_says_what_parts_there_are(modules):
    _, one, several = re.split("^## (?:One GPU|Several GPUs)$", PAGE.read_text(), flags=re.MULTILINE)
    for text, check in ((one, "gpu"), (several.partition("## ")[0], "multi_gpu")):
        rows = re.findall(r"^\| `(\w+)` \| (\d+) s \|", text, flags=re.MULTILINE)
        assert rows == [(p.name, f"{p.seconds:.0f}") for p in modules["registry"].CHECKS[check]]
    assert modules["registry"].SECONDS["gpu"] < 9 * 60


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """What the runner says of parts that fail: the exit status, the report, its directory and the output."""
    out = tmp_path_factory.mktemp("failing")
    script = ROOT / "tests" / "helpers" / "gpu_check_parts.py"
    process = nursery().start([script, out], env=environment(), log=out / "log")
    try:
        status = process.wait(60)
    finally:
        process.kill_group()
    return status, read(out / "gpu-rehearsal.json"), out, (out / "log").read_text()


PARTS = {
    "lacks": ("skipped", "not installed: no_such_package"),
    "finds": ("failed", r"one section \(ArithmeticError: it has miscounted\)"),
    "hangs": ("timed_out", "it was ended after 2 s"),
    "dies": ("failed", "exit status -6; see logs/dies.log"),
    "wrong": ("failed", "wrong: one is two"),
    "right": ("passed", None),
    "late": ("skipped", r"\d+ s were left, and it takes 1000"),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_fails_stops_no_other_and_loses_nothing(failing, name):
    status, report, out, output = failing
    assert status == 1, output
    part, (result, reason) = report["parts"][name], PARTS[name]
    assert part["status"] == result, output
    assert part["reason"] is None if reason is None else re.fullmatch(reason, part["reason"])
    row = next(
        line for line in (out / "gpu-rehearsal.md").read_text().splitlines() if line.startswith(f"| {name} |")
    )
    assert result.replace("_", " ") in row


def test_what_a_part_found_before_it_failed_is_kept(failing):
    parts = failing[1]["parts"]
    assert parts["finds"]["values"] == {"some_seconds": 1.5}
    assert parts["finds"]["checks"] == {"all is well": True}
    assert parts["hangs"]["values"] == {"before_bytes": 2**30}
    assert parts["dies"]["checks"] == {"it lives": True}
    assert "ArithmeticError" in failing[3]


def test_what_a_part_has_started_ends_with_it(failing):
    pid = int((failing[2] / "child.pid").read_text())
    deadline = time.monotonic() + 20
    while (stat := Path(f"/proc/{pid}/stat")).exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def measured(**values):
    """A report of one part."""
    part = {
        "status": "passed",
        "reason": None,
        "seconds": 3.0,
        "values": values,
        "checks": {"one | two": True},
    }
    part |= {"failures": {}, "skipped": {}}
    versions = dict.fromkeys(("torch", "triton", "transformers", "deepspeed", "vllm", "driver"), "1.0")
    return {
        "schema": 1,
        "check": "gpu",
        "is_rehearsal": False,
        "date": "2026-12-01T00:00:00",
        "commit": "abc",
        "seconds": 9.0,
        "num_ranks": 1,
        "machine": versions | {"device": "a GPU", "python": "3.12"},
        "parts": {"decode": part},
    }


TOKEN = {
    "copy_bytes_per_second": 4e12,
    "token_weights_bytes": 14e9,
    "token_cache_bytes": 12e9,
    "token_seconds": 12e-3,
    "token_matmul_seconds": 4e-3,
    "token_attention_seconds": 5e-3,
    "token_other_seconds": 2e-3,
    "token_idle_seconds": 1e-3,
}


def test_tables_of_a_page_are_filled_in_again_and_again(modules, tmp_path, capsys):
    page = tmp_path / "page.md"
    marks = "before\n<!-- gpu_check: {} -->\nold\n<!-- gpu_check: end -->\nafter\n"
    page.write_text(marks.format("token") + marks.format("summary") + marks.format("of_the_future"))
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(measured(**TOKEN)))
    for _ in range(2):
        assert modules["cli"].main(["--from-json", str(file), "--fill", str(page)]) == 0
    text = page.read_text()
    assert text.count("old") == 1, "a table that no report has is left as it is"
    assert text.count("| matrix products: weights | 14.00 | 5.19 | 3.50 | 4.00 |") == 1
    assert text.count("| in all | 26.00 | 15.19 | 6.50 | 12.00 |") == 1
    assert text.count("| decode | passed | 1 | 0 | 3 |  |") == 1
    assert text.count("before\n") == text.count("after\n") == 3
    assert "`token_share" not in text
    assert "| `copy_bytes_per_second` | 4,000.00 GB/s |" in (tmp_path / "gpu.md").read_text()
    # A report without the figures leaves a table as it is.
    file.write_text(json.dumps(measured()))
    modules["cli"].main(["--from-json", str(file), "--fill", str(page)])
    assert "14.00 | 5.19" in page.read_text()
    page.write_text("no tables")
    with pytest.raises(SystemExit, match="has no table to fill in"):
        modules["cli"].main(["--from-json", str(file), "--fill", str(page)])
    capsys.readouterr()


def test_the_tables_of_the_page_on_performance_can_be_filled_in(modules, tmp_path, capsys):
    text = (ROOT / "docs" / "performance.md").read_text()
    # The arithmetic there is what the code has for the model's sizes.
    sizes = modules["random_model"].SIZES["7B"]
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    kept = sizes["num_key_value_heads"] * head
    layer = sizes["hidden_size"] * (2 * sizes["hidden_size"] + 2 * kept + 3 * sizes["intermediate_size"])
    vectors = sizes["hidden_size"] + 2 * kept + 2 * sizes["hidden_size"]  # biases and norms
    weights = sizes["num_hidden_layers"] * (layer + vectors)
    weights += sizes["vocab_size"] * sizes["hidden_size"] + sizes["hidden_size"]
    cache = 200 * 1174 * 2 * sizes["num_hidden_layers"] * kept
    values = TOKEN | {"token_weights_bytes": 2 * weights, "token_cache_bytes": 2 * cache}
    rows = modules["report"].token_table(measured(**values))
    if "Nothing has run on a GPU yet." in text:  # else the page has a report's own sizes
        for row in rows[2:]:
            assert re.match(r"(\|[^|]*){3}\|", row)[0] in text
    page, file = tmp_path / "page.md", tmp_path / "gpu.json"
    page.write_text(text)
    file.write_text(json.dumps(measured(**values)))
    modules["cli"].main(["--from-json", str(file), "--fill", str(page)])
    filled = page.read_text()
    assert "2 table(s)" in capsys.readouterr().out
    assert "Nothing has run" not in filled
    table = re.compile(r"<!-- gpu_check: \w+ -->.*?<!-- gpu_check: end -->", flags=re.DOTALL)
    assert table.sub("", filled) == table.sub("", text)


def test_mistakes_are_told(modules, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        modules["cli"].main(["--only", "kernels", "kernel"])
    assert "got kernel; wanted one or more of machine, kernels" in capsys.readouterr().err
    monkeypatch.setattr(modules["cli"], "num_gpus", lambda: 1)
    assert modules["cli"].main(["--check", "multi_gpu"]) == 2
    assert "torch sees 1 GPU(s), and this check takes at least 2; --rehearse" in capsys.readouterr().err
    assert modules["cli"].main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(modules["registry"].GPU)


def test_the_scripts_pass_their_arguments_on(tmp_path):
    """They find an interpreter, and the repository from anywhere."""
    import subprocess

    env = environment(PYTHON=sys.executable)
    for script, part in (("gpu_check.sh", "kernels"), ("multi_gpu_check.sh", "links")):
        command = ["bash", str(ROOT / "tools" / script), "--list"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert re.search(rf"^{part} ", done.stdout, flags=re.MULTILINE)
    assert os.access(ROOT / "tools" / "gpu_check.sh", os.X_OK)
