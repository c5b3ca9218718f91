"""docs/configuration.md is what the schema says; the other pages and files leave the keys to it."""

import sys

import pytest

from shardes.config.schema import Config
from tests.helpers.ranks import ROOT, run_command
from tools import make_configuration_reference as reference


def test_the_page_is_what_the_schema_says():
    assert reference.PAGE.read_text() == reference.render(), (
        "the schema has changed: python tools/make_configuration_reference.py"
    )


def test_the_page_has_every_key_of_every_section():
    sections = dict(zip(Config.model_fields, reference.render().split("\n## ")[1:], strict=False))
    for section, field in Config.model_fields.items():
        rows = [line for line in sections[section].splitlines() if line.startswith("| `")]
        assert [row.split("`")[1] for row in rows] == list(field.annotation.model_fields)
        assert all(len(row.replace("\\|", "").split("|")) == 6 for row in rows)


@pytest.mark.parametrize(
    ("key", "value", "default", "words"),
    [
        ("seed", "integer at least 0 and below 2^64", "`0`", "The key of all noise"),
        ("population", "2^24, or mapping, each value integer at least 2", "`30`", "Members evaluated"),
        ("adam_betas", "list of 2 items, each number above 0 and below 1", "`[0.9, 0.999]`", "for `adam`"),
        ("report_to", "list, each `tensorboard`, `wandb`", "`[]`", "Trackers"),
        (
            "rewards",
            "list, each as in [items of `task.rewards`](#items-of-taskrewards), or `null`",
            "`null`",
            "",
        ),
        ("members_per_forward", "integer above 0, or `auto`", "`1`", "`es.noise: low_rank`"),
        ("iterations", "integer above 0 and below 2^32", "-", "update"),
        ("dtype", "`float32`, `bfloat16`, `float16`", "`bfloat16`", "exported"),
    ],
)
def test_a_row_has_values_default_and_meaning(key, value, default, words):
    row = next(line for line in reference.render().splitlines() if line.startswith(f"| `{key}` "))
    _, _, values, shown, meaning, _ = row.replace("\\|", "").split("|")
    assert value in values
    assert shown.strip() == default
    assert words in meaning


def test_values_without_words_are_refused():
    with pytest.raises(ValueError, match="no words for"):
        reference.shown_type({"type": "tuple"})


def test_the_command_compares_and_writes(tmp_path, monkeypatch):
    assert run_command([sys.executable, "tools/make_configuration_reference.py", "--check"]).returncode == 0
    monkeypatch.setattr(reference, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text("old")
    for argv, status in (["--check"], 1), ([], 0), (["--check"], 0):
        monkeypatch.setattr(sys, "argv", ["make", *argv])
        assert reference.main() == status


def test_other_files_refer_to_the_page():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/**/*.yaml")]:
        text = " ".join(path.read_text().split())
        assert "explained in configs/quickstart.yaml" not in text, path
        assert "explained in [configs/quickstart.yaml]" not in text, path
