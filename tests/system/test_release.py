"""What a release consists of agrees: version, files of the wheel, and what points to them."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

from shardes.utils import shipped
from shardes.utils.version import VERSION
from tests.helpers.inprocess import call
from tests.helpers.ranks import ROOT


def test_the_version_is_the_same_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    releases = re.findall(r"^## \[(\d.*)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert releases[0] == (VERSION, str(cited["date-released"]))
    assert cited["version"] == VERSION
    assert [version for version, _ in releases] == sorted((v for v, _ in releases), reverse=True)
    assert call("shardes", "--version").stdout.split() == ["shardes,", "version", VERSION]


def test_a_wheel_has_the_files_that_the_quickstart_copies(monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    built = runpy.run_path(str(ROOT / "setup.py"))
    assert built["SHIPPED"] == shipped._QUICKSTART
    monkeypatch.chdir(ROOT)
    assert {path.name for path in built["_shipped_files"]()} >= {"quickstart.yaml", "model.safetensors"}


def test_the_quickstart_is_copied_once_and_over_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for directory in (".", "a b", "."):
        done = call("shardes", "quickstart", *([] if directory == "." else [directory]))
        assert done.returncode == 0, done.stderr
        assert ("    cd 'a b'" in done.stdout.splitlines()) == (directory == "a b")
        copies = {p.relative_to(directory) for p in Path(directory).rglob("*") if p.is_file()}
        for copy in copies - {p for p in copies if p.parts[0] == "a b"}:
            assert (tmp_path / directory / copy).read_bytes() == (ROOT / copy).read_bytes()
        assert len(list((tmp_path / directory / "configs").rglob("*.*"))) == 8
    # A file of the user's is neither replaced nor is anything written beside it.
    Path("mine/configs").mkdir(parents=True)
    Path("mine/configs/quickstart.yaml").write_text("mine")
    refused = call("shardes", "quickstart", "mine")
    assert refused.returncode == 2
    assert "mine/configs/quickstart.yaml: another file has this name" in refused.stderr
    assert [p.name for p in Path("mine").rglob("*") if p.is_file()] == ["quickstart.yaml"]
    Path("file").write_text("")
    assert call("shardes", "quickstart", "file").returncode == 2


def test_an_installation_without_the_files_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "site-packages" / "shardes")
    refused = call("shardes", "quickstart", tmp_path)
    assert refused.returncode == 2
    assert "not part of this installation" in refused.stderr
    # An installed package has them in itself.
    installed = tmp_path / "site-packages" / "shardes" / "shipped" / "configs"
    installed.mkdir(parents=True)
    (installed / "quickstart.yaml").write_text("installed")
    assert call("shardes", "quickstart", tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "configs" / "quickstart.yaml").read_text() == "installed"


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.stem)
def test_what_github_reads_is_yaml_and_runs_what_is_there(path):
    content = yaml.safe_load(path.read_text())
    if path.parent.name == "workflows":
        runs = [step["run"] for job in content["jobs"].values() for step in job["steps"] if "run" in step]
        scripts = [run.split()[1] for run in runs if run.startswith("bash ")]
        assert scripts == [".ci/run"]
        assert all((ROOT / script).is_file() for script in scripts)
    elif path.stem != "config":
        assert content.keys() == {"name", "description", "labels", "body"}
        ids = [part["id"] for part in content["body"]]
        assert len(set(ids)) == len(ids)
