"""Links of all pages lead somewhere, in a checkout and on the site."""

import functools
import re
import subprocess
from types import SimpleNamespace

from tests.helpers.ranks import ROOT
from tools import site_links

PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "configs/**/*.md",
        "examples/*.md",
        "launch/*.md",
        "benchmarks/*.md",
    )
    for path in ROOT.glob(pattern)
)
# Hosts that texts and settings name. A new one is looked at before it is added: it has to exist.
HOSTS = {
    *("arxiv.org", "github.com", "huggingface.co", "pypi.org", "download.pytorch.org", "docs.vllm.ai"),
    *("keepachangelog.com", "semver.org"),
    *("127.0.0.1", "localhost"),
}


@functools.cache
def anchors(path):
    """The anchors of a page's headings, as code hosts make them."""
    text = re.sub(r"^ *(```+).*?^ *\1 *$", "", (ROOT / path).read_text(), flags=re.MULTILINE | re.DOTALL)
    found = set()
    for title in re.findall(r"^#+ +(.*)$", text, re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", shown).strip().replace(" ", "-")
        number = next(n for n in range(99) if (f"{slug}-{n}" if n else slug) not in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found | set(re.findall(r'id="([^"]+)"', text))


def test_links_lead_to_files_and_headings_that_exist():
    lost = []
    for page in PAGES:
        for match in site_links.links_in((ROOT / page).read_text()):
            target = site_links.target_of(match[0], origin=page)
            if target is not None:
                path, anchor = target
                if not (ROOT / path).exists() or (anchor and anchor not in anchors(path)):
                    lost.append((page, match[0]))
    assert lost == []


def test_hosts_are_known():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    suffixes = (".md", ".cff", ".toml", ".yml", ".yaml")
    found = {
        host: path
        for path in tracked
        if path.endswith(suffixes)
        for host in re.findall(r"https?://([\w.-]+)", (ROOT / path).read_text())
    }
    assert {host: path for host, path in found.items() if host not in HOSTS} == {}


def rewritten(text, uri):
    page = SimpleNamespace(file=SimpleNamespace(src_uri=uri))
    return site_links.on_page_markdown(text, page, None, None)


def test_links_of_the_site_lead_to_the_same_places(caplog):
    def check(text, uri, wanted):
        assert rewritten(text, uri) == wanted

    # From docs/ out of it, and to a page, to its own heading and to a code host's directory.
    check("[a](../README.md#install) b", "noise.md", "[a](index.md#install) b")
    check("[a](../configs/quickstart.yaml)", "noise.md", "[a](files/configs/quickstart.yaml)")
    check("[a](../noise.md#x)", "decisions/0002-mistakes-first.md", "[a](../noise.md#x)")
    check("[a](#x)", "noise.md", "[a](#x)")
    check(
        "see [`configs/tasks`](../configs/tasks), [b](api.md)", "noise.md", "see `configs/tasks`, [b](api.md)"
    )
    # From a page outside of docs/ into it, and beside it.
    check("![a](docs/quickstart.png) [b](docs/api.md)", "index.md", "![a](quickstart.png) [b](api.md)")
    check("[a](configs/paper)", "index.md", "[a](repository/configs/paper/README.md)")
    check("[a](../../docs/tasks.md)", "repository/configs/paper/README.md", "[a](../../../tasks.md)")
    check("[a](quickstart.yaml)", "configs.md", "[a](files/configs/quickstart.yaml)")
    # Other sites and code stay as they are.
    for text in (
        "[a](https://arxiv.org/abs/2509.24372)",
        "`[a](x.md)` ``[`a`](x.md)``",
        "```\n[a](x.md)\n```",
    ):
        check(text, "noise.md", text)
    assert caplog.records == []
    rewritten("[a](nothing.md)", "noise.md")
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_pages_that_the_table_of_contents_leaves_out_are_listed_all_the_same(tmp_path):
    (tmp_path / "decisions").mkdir()
    for name in ("a.md", "b.md", "decisions/README.md", "decisions/0001-x.md"):
        (tmp_path / name).write_text("")
    nav = [{"Start": ["index.md", {"A": "a.md"}]}, {"Built": ["changelog.md"]}]
    config = site_links.on_config(SimpleNamespace(docs_dir=str(tmp_path), nav=nav))
    decisions = {"Decisions": ["decisions/README.md", "decisions/0001-x.md"]}
    assert config.nav == [nav[0], {"Built": ["changelog.md", decisions]}, {"More": ["b.md"]}]
