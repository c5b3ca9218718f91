"""Reading problems: all formats give the same rows, and a mistake is one message that names its place."""

import collections
import csv
import datetime
import decimal
import fractions
import gzip
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardes.config.schema import ProblemSetConfig, TaskConfig
from shardes.errors import UserError
from shardes.tasks.data import read_rows, rows_sha256, split_rows
from shardes.tasks.loading import load_task
from tests.helpers.ranks import ROOT

REWARD = "tests/helpers/rewards.py:spread"
LINE_SEPARATOR = chr(0x2028)
ROWS = [
    {"prompt": "one", "n": 1, "x": 0.5, "list": [1, 2], "note": "a"},
    {"prompt": "two, with a comma\nand a line break", "n": -2, "x": 1e-9, "list": [], "note": '"quoted"'},
    {"prompt": "größer \u2028 3", "n": 3, "x": 2.0, "list": [3], "note": "007"},
]


def rows_of(tmp_path, content, *, key="data", name="rows.jsonl", **settings):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    good = tmp_path / "good.jsonl"
    good.write_text('{"prompt": "p"}\n')
    paths = {"data": good} | {key: path}
    task = load_task(TaskConfig(reward=REWARD, **paths, **settings))
    return list(task.train if key == "data" else task.heldout)


def refusal(tmp_path, content, **arguments):
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path, content, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read(path, **arguments):
    return read_rows(path, key="task.data", check=lambda row, where: None, **arguments)


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_csv(path, rows, *, delimiter=","):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow([json.dumps(v) if isinstance(v, list) else v for v in row.values()])
    return path


def write_as(tmp_path, kind, rows):
    path = tmp_path / f"rows.{kind}"
    if kind in ("jsonl", "txt"):
        path.write_text(jsonl(rows))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "json of lines":
        path = tmp_path / "rows.json"
        path.write_text(jsonl(rows))
    elif kind in ("csv", "tsv"):
        write_csv(path, rows, delimiter="," if kind == "csv" else "\t")
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "txt", "json", "json of lines", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows_and_the_same_hash(tmp_path, kind):
    rows = read(write_as(tmp_path, kind, ROWS))
    assert rows == ROWS
    assert [list(map(type, row.values())) for row in rows] == [list(map(type, r.values())) for r in ROWS]
    assert rows_sha256(rows) == rows_sha256(ROWS)
    assert rows_sha256([dict(reversed(row.items())) for row in rows]) == rows_sha256(rows)
    assert rows_sha256(rows[::-1]) != rows_sha256(rows)


def test_data_sets_saved_to_disk(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    data_set = datasets.Dataset.from_list(ROWS)
    data_set.save_to_disk(tmp_path / "one")
    both = datasets.DatasetDict({"train": data_set, "test": data_set.select([2, 0])})
    both.save_to_disk(tmp_path / "both")
    datasets.DatasetDict({"train": data_set}).save_to_disk(tmp_path / "only")

    for source in ("one", "both@train", "only", "only@train"):
        assert read(tmp_path / source) == ROWS
    assert read(tmp_path / "both@test") == [ROWS[2], ROWS[0]]
    for source, words in {
        "both": "it has several splits; choose one of them with @ behind the name: train, test",
        "both@dev": "there is no split 'dev'; choose one",
        "one@train": "has no splits; leave @train away",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            read(tmp_path / source)
        assert str(caught.value).startswith(f"task.data: {tmp_path / source.split('@')[0]}")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="bare is no data set saved to disk"):
        read(tmp_path / "bare")
    # Nothing is fetched in a test: what the hub's loader is asked for is what the reference says.
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or both)
    config = ProblemSetConfig(name="exact_match", data="hf:some/name:main@test", columns={"answer": "note"})
    assert [row["answer"] for row in load_task(config).train] == ["007", "a"]
    assert asked == [("some/name", "main")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: 1 / 0)
    with pytest.raises(UserError, match=r"hf:some/name cannot be loaded \(ZeroDivisionError: division"):
        load_task(ProblemSetConfig(name="exact_match", data="hf:some/name"), key="eval.sets.other")


def test_images_and_arrays_are_told_apart_by_what_they_show(tmp_path):
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    pictures = [image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "red")]
    maps = [[[float(i == j == 3)] * 50 for i in range(30)] for j in range(3)]
    data_set = datasets.Dataset.from_dict({"prompt": ["p"] * 3, "image": pictures, "map": maps})
    data_set.save_to_disk(tmp_path / "plain")
    data_set.with_format("numpy").save_to_disk(tmp_path / "numpy")
    data_set.with_format("torch").save_to_disk(tmp_path / "torch")
    for source in ("plain", "numpy", "torch"):
        rows = read(tmp_path / source)
        assert type(rows[0]["image"]).__module__.split(".")[0] == {"plain": "PIL"}.get(source, source)
        assert rows_sha256(rows) == rows_sha256(read(tmp_path / source))  # other objects, elsewhere in memory
        hashes = [rows_sha256([{**row, "map": 0}]) for row in rows]
        assert [hashes.index(each) for each in hashes] == [0, 1, 0]
        train, heldout = split_rows(rows, fraction=0.5, seed=0)
        assert {len(train), len(heldout)} == {1, 2}  # equal problems stay together
    # An array that is not shown as a whole.
    rows = [{"map": numpy.zeros(2000)} for _ in range(3)]
    rows[1]["map"][1000] = 1
    hashes = [rows_sha256([row]) for row in rows]
    assert [hashes.index(each) for each in hashes] == [0, 1, 0]


class Grid:
    def __init__(self, cells, within=None):
        self.cells = cells
        self.within = within


class Slotted:
    __slots__ = ("cells",)

    def __init__(self, cells):
        self.cells = cells


@pytest.mark.parametrize(
    "make",
    [
        lambda n: Grid([n, 2]),
        lambda n: Grid({"a": Grid((n,))}),
        lambda n: Slotted(n),
        lambda n: {"a": [Grid(n)]},
        lambda n: (Slotted(n),),
        lambda n: collections.deque([Grid(n)]),
        lambda n: {"x", "y", f"z{n}"},
        lambda n: frozenset({b"x", b"y", n}),
        lambda n: {1: n, "a": 2, (1, 2): 3, None: 4},
        lambda n: memoryview(b"ab%d" % n),
        lambda n: datetime.datetime(2026, 1, n),
        lambda n: fractions.Fraction(1, n),
        lambda n: Path(f"/0xffffffff/{n}"),
    ],
)
def test_any_object_is_told_apart_by_its_contents(make):
    assert rows_sha256([{"a": make(1)}]) == rows_sha256([{"a": make(1)}])
    assert rows_sha256([{"a": make(1)}]) != rows_sha256([{"a": make(2)}])


SETS = """
from shardes.tasks.data import rows_sha256
print(rows_sha256([{'a': set('abcdef'), 'b': [{('x', 'y')}]}]))
"""


def test_sets_are_the_same_in_every_process():
    environments = [os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)} for seed in "12"]
    command = [sys.executable, "-c", SETS]
    hashes = {subprocess.check_output(command, env=environment) for environment in environments}
    assert len(hashes) == 1


def test_the_hash_of_rows_is_pinned():
    """Runs of earlier versions go on: what had a text before has the same text."""
    rows = [
        {
            "prompt": "p\u00fc",
            "n": 1,
            "x": 0.5,
            "list": [1, None, True],
            "nested": {"b": 1, "a": [2]},
            "id": 3,
        },
        {"bytes": b"\x00\xff", "when": datetime.datetime(2026, 1, 2, 3), "some": decimal.Decimal("0.10")},
        {"array": numpy.arange(3), "scalar": numpy.int64(3), "tuple": (1, "a")},
    ]
    assert rows_sha256(rows) == "0d094119cf0dc7d424b4cf7aa9c08012adebdff898393770bdf974360aa70d30"


def test_an_object_that_nothing_is_known_of_is_refused_where_it_stands(tmp_path, monkeypatch):
    from shardes.tasks import data

    rows = [("row 1", {"prompt": "p", "video": None}), ("row 2", {"prompt": "p", "video": iter(())})]
    rows[1][1]["video"] = threading.Lock()
    monkeypatch.setattr(data, "_read", lambda source, key: iter(rows))
    with pytest.raises(UserError, match=r"^task.data: d row 2: column 'video': <unlocked .*cannot pickle"):
        read(Path("d"))


def test_a_damaged_image_is_refused_by_its_row(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    rows = {"prompt": ["p"] * 2, "image": [None, {"bytes": b"no image", "path": None}]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "broken")
    with pytest.raises(UserError, match=r"broken row 2 cannot be read \(UnidentifiedImageError: "):
        read(tmp_path / "broken")


@pytest.mark.parametrize(("module", "name"), [("pyarrow.parquet", "rows.parquet"), ("datasets", "hf:a/b")])
def test_a_missing_package_is_named_with_the_extra_that_has_it(tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "rows.parquet").write_bytes(b"")
    path = name if name.startswith("hf:") else tmp_path / name
    with pytest.raises(UserError, match=rf"package {module.split('.')[0]}; .*pip install 'shardes\[data\]'"):
        load_task(ProblemSetConfig(reward=REWARD, data=path))


def test_plain_files_need_neither_torch_nor_the_libraries_of_tables():
    code = (
        "import sys\nfrom pathlib import Path\nfrom shardes.config.schema import TaskConfig\n"
        "from shardes.tasks.loading import load_task\n"
        "load_task(TaskConfig(name='countdown_short', data=Path('configs/quickstart/train.jsonl')))\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'pandas', 'datasets', 'sympy', 'math_verify', 'jinja2'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_numbers_and_lists_in_csv_are_read_only_where_a_whole_column_has_them(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('a,b,c,d,e\n1,1,true,01,"[1]"\n2,x,false,2,"[2, 3]"\n')
    expected = [
        {"a": 1, "b": "1", "c": "true", "d": "01", "e": [1]},
        {"a": 2, "b": "x", "c": "false", "d": "2", "e": [2, 3]},
    ]
    assert read(path) == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("r.csv", "prompt,x\na,1\nb\n", "line 3: 1 cells, but line 1 names 2 columns"),
        ("r.csv", "prompt,prompt\na,1\n", "line 1: two columns have the same name"),
        ("r.csv", 'prompt\n"a\n', "line 2: not CSV"),
        ("r.csv", "prompt\n", "has no rows"),
        ("r.csv", "text\na\n", "line 2: prompt is None"),
        ("r.json", "[]", "has no rows"),
        ("r.json", '{"prompt": "a"}', "got {'prompt': 'a'}; wanted: a list of objects"),
        ("r.json", "[1,", "not JSON"),
        ("r.json", '[{"prompt": "a"}, 3]', "item 2: got 3; every item must be one JSON object"),
        ("r.json", '{"prompt": "a"}\n{"prompt": 3}\n', "line 2: prompt is 3"),
        pytest.param("r.json", "[" * 100_000, "not JSON", id="deep json"),
        pytest.param("r.jsonl", '{"prompt": "a"}\n' + "[" * 100_000, "line 2: not JSON", id="deep line"),
        ("r.parquet", "no table", "r.parquet: not a Parquet file"),
    ],
)
def test_a_broken_table_is_refused_with_its_place(tmp_path, name, content, words):
    message = refusal(tmp_path, content, name=name)
    assert message.startswith(f"task.data: {tmp_path / name}")
    assert words in message


@pytest.mark.parametrize("name", ["rows.CSV", "rows.Tsv", "rows.JSONL", "rows.Json", "rows.PARQUET"])
def test_endings_may_be_in_capital_letters(tmp_path, name):
    rows = [{"prompt": "a,b", "x": 1}, {"prompt": "c", "x": 2}]
    path = write_as(tmp_path, name.lower().rpartition(".")[2], rows)
    assert read(path.rename(tmp_path / name)) == rows


def test_a_cell_of_a_table_may_be_longer_than_the_csv_module_takes_by_default(tmp_path):
    limit = csv.field_size_limit()
    write_csv(tmp_path / "rows.csv", [{"prompt": "x" * 400_000}])
    assert read(tmp_path / "rows.csv") == [{"prompt": "x" * 400_000}]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "r.jsonl",
            '{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}',
            "line 2: not JSON .the name 'prompt' is",
        ),
        ("r.json", '[{"prompt": "a", "x": {"y": 1, "y": 2}}]', "not JSON .the name 'y' is given twice"),
        ("r.jsonl", '{"prompt": ' + "[" * 100_000, "line 1: not JSON .its lists and objects are nested"),
        ("r.csv", "prompt,x\na," + "[" * 100_000 + "\n", None),
    ],
)
def test_json_that_loses_a_value_or_is_too_deep_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    if words is None:  # a text like any other
        assert read(tmp_path / name)[0]["x"] == "[" * 100_000
        return
    with pytest.raises(UserError, match=words):
        read(tmp_path / name)


def test_a_broken_link_and_a_pipe_are_called_what_they_are(tmp_path):
    (tmp_path / "link.jsonl").symlink_to("nowhere.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(
        UserError, match=r"link\.jsonl cannot be read .it is a link to nowhere\.jsonl, which does not exist"
    ):
        read(tmp_path / "link.jsonl")
    with pytest.raises(UserError, match=r"pipe\.jsonl cannot be read .it is a pipe, and not a file"):
        read(tmp_path / "pipe.jsonl")


@pytest.mark.parametrize("key", ["data", "heldout_data"])
def test_a_line_that_is_not_json_is_named_by_file_and_number(tmp_path, key):
    message = refusal(tmp_path, '{"prompt": "a"}\n\n{"prompt": \n', key=key)
    assert message.startswith(f"task.{key}: {tmp_path / 'rows.jsonl'} line 3: not JSON")


@pytest.mark.parametrize("line", ["[1]", '"text"', "3", "null"])
def test_a_line_that_is_no_object_is_refused(tmp_path, line):
    message = refusal(tmp_path, f'{{"prompt": "a"}}\n{line}\n')
    assert "line 2" in message
    assert "one JSON object" in message


def test_empty_lines_are_allowed_wherever_they_are(tmp_path):
    content = '\n  \n{"prompt": "a", "x": 1}\r\n\r\n\t\n{"prompt": "b"}'
    assert rows_of(tmp_path, content) == [{"prompt": "a", "x": 1}, {"prompt": "b"}]


@pytest.mark.parametrize("content", ["", "\n", " \n\t\n"])
def test_a_file_without_rows_is_refused(tmp_path, content):
    assert "has no rows" in refusal(tmp_path, content)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path, words in ((tmp_path / "none.jsonl", "cannot be read"), (tmp_path, "is no data set")):
        with pytest.raises(UserError, match=words) as caught:
            load_task(TaskConfig(reward=REWARD, data=path))
        assert str(caught.value).startswith(f"task.data: {path} ")


def test_bytes_that_are_not_utf8_are_refused_with_their_place(tmp_path):
    message = refusal(tmp_path, b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    assert "is not UTF-8 text" in message
    assert "at byte 28" in message


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    prompt = f"one{LINE_SEPARATOR}two\x85three"
    content = json.dumps({"prompt": prompt}, ensure_ascii=False) + '\n{"prompt": "b"}\n'
    assert LINE_SEPARATOR in content
    assert [row["prompt"] for row in rows_of(tmp_path, content)] == [prompt, "b"]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a"},
        {"prompt": None},
        {"prompt": ""},
        {"prompt": 3},
        {"prompt": []},
        {"prompt": ["a"]},
        {"prompt": [{"role": "user"}]},
        {"prompt": {"role": "user", "content": "a"}},
    ],
    ids=str,
)
def test_a_row_without_a_usable_prompt_is_refused(tmp_path, row):
    message = refusal(tmp_path, '{"prompt": "a"}\n' + json.dumps(row))
    assert f"line 2: prompt is {row.get('prompt')!r}" in message


def test_prompts_are_passed_on_as_they_are(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "n"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": chat}) + '\n{"prompt": " a "}\n')
    task = load_task(TaskConfig(reward=REWARD, data=tmp_path / "d.jsonl"))
    assert [task.make_prompt(row) for row in task.train] == [chat, " a "]
    assert task.heldout == []


def test_columns_are_mapped_and_kept(tmp_path):
    content = '{"question": "q", "gold": 7}\n'
    columns = {"prompt": "question", "answer": "gold", "again": "gold"}
    (row,) = rows_of(tmp_path, content, columns=columns)
    assert row == {"question": "q", "gold": 7, "prompt": "q", "answer": 7, "again": 7}


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    content = '{"question": "q"}\n{"query": "q", "x": 1}\n'
    message = refusal(tmp_path, content, columns={"prompt": "question"})
    assert "line 2: column 'question' is missing, which task.columns gives for 'prompt'" in message
    assert message.endswith("the row has 'query', 'x'")


def test_the_messages_of_another_section_name_its_keys(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "q"}\n')
    key = "eval.sets.other"
    for settings, words in [
        ({}, f"{key}.data: {tmp_path / 'rows.jsonl'} line 1: prompt is None"),
        ({"columns": {"prompt": "text"}}, f"which {key}.columns gives for 'prompt'"),
        ({"template": "{{"}, f"{key}.template: line 1: "),
        ({"template": "{{ text }}"}, f"{key}.template fails"),
    ]:
        with pytest.raises(UserError) as caught:
            load_task(ProblemSetConfig(reward=REWARD, data=tmp_path / "rows.jsonl", **settings), key=key)
        assert words in str(caught.value)


def test_two_rows_of_one_id_are_refused_by_both_their_lines(tmp_path):
    content = '{"prompt": "a", "id": "p1"}\n{"prompt": "b", "id": 1}\n\n{"prompt": "c", "id": "p1"}\n'
    assert "line 4: column 'id' is 'p1', as in line 1; give each" in refusal(tmp_path, content)
    content = '{"prompt": "a", "n": 1}\n{"prompt": "a", "n": 1}\n{"prompt": "a", "id": null}\n'
    assert len(rows_of(tmp_path, content + '{"prompt": "a", "id": null}\n')) == 4  # no ids, no complaint
    assert "column 'id' is 1" in refusal(tmp_path, content[:48], columns={"id": "n"})


CONTENT = '{"question": "1+1", "n": 2, "prompt": "own"}\n'


def prompts(tmp_path, content=CONTENT, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    task = load_task(TaskConfig(reward=REWARD, data=path, **settings))
    return [task.make_prompt(row) for row in task.train]


def test_a_template_makes_a_text(tmp_path):
    (prompt,) = prompts(tmp_path, template="{{ question }}=?{% if n > 1 %} ({{ n }}){% endif %}\n")
    assert prompt == "1+1=? (2)"


def test_markup_is_not_escaped(tmp_path):
    assert prompts(tmp_path, template="<b>{{ '<' }}</b>") == ["<b><</b>"]


def test_a_system_message_makes_a_chat(tmp_path):
    own = {"role": "user", "content": "own"}
    asked = {"role": "user", "content": "1+1?"}
    system = {"role": "system", "content": "be brief"}
    assert prompts(tmp_path, system="be brief") == [[system, own]]
    assert prompts(tmp_path, system="be brief", template="{{ question }}?") == [[system, asked]]
    assert prompts(tmp_path, system="", template="{{ question }}?") == [[asked]]


def test_a_system_message_replaces_the_built_in_tasks(tmp_path):
    path = tmp_path / "countdown.jsonl"
    path.write_text('{"numbers": [1, 2], "target": 3}\n')
    task = load_task(TaskConfig(name="countdown", data=path, system="Sei kurz."))
    plain = load_task(TaskConfig(name="countdown", data=path))
    row = plain.train[0]
    assert [m["role"] for m in plain.make_prompt(row)] == ["system", "user"]
    assert task.make_prompt(row) == [
        {"role": "system", "content": "Sei kurz."},
        plain.make_prompt(row)[1],
    ]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ question", "task.template: line 1: unexpected end of template"),
        ("a\n{% if %}", "task.template: line 2: "),
        (
            "{{ answer }}",
            "line 1: task.template fails (UndefinedError: 'answer' is undefined); the row has",
        ),
        ("{{ question.x.y }}", "line 1: task.template fails (UndefinedError"),
        ("{{ n / 0 }}", "line 1: task.template fails (ZeroDivisionError"),
        ("{{ question + n }}", "line 1: task.template fails (TypeError"),
        ("{{ ''.__class__.__mro__ }}", "line 1: task.template fails (SecurityError"),
        ("{% if n == 1 %}x{% endif %}", "line 1: prompt is ''; wanted a non-empty text"),
    ],
)
def test_a_template_that_fails_is_refused_with_the_line_it_fails_for(tmp_path, template, words):
    message = refusal(tmp_path, CONTENT, template=template)
    assert words in message


def test_columns_of_any_name_can_be_used(tmp_path):
    content = '{"key": "a", "template": "b", "row": "c"}\n'
    assert prompts(tmp_path, content, template="{{ key }}{{ template }}{{ row }}") == ["abc"]


SPLIT_ROWS = tuple({"prompt": f"p{i % 40}", "id": i, "n": i % 40} for i in range(50))


def split(tmp_path, rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text(jsonl(rows))
    task = load_task(TaskConfig(reward=REWARD, data=path, heldout_fraction=0.25, **settings))
    return task.train, task.heldout


def test_a_split_depends_on_the_problems_alone(tmp_path):
    train, heldout = split(tmp_path, SPLIT_ROWS)
    assert len({row["prompt"] for row in heldout}) == 10  # a quarter of 40 problems
    assert sorted(row["id"] for row in [*train, *heldout]) == list(range(50))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}
    turned = split(tmp_path, SPLIT_ROWS[::-1])
    assert [part[::-1] for part in turned] == [train, heldout]
    # Other ids are no other problems.
    renamed = split(tmp_path, [row | {"id": f"x{row['id']}"} for row in SPLIT_ROWS])
    assert [row["prompt"] for row in renamed[1]] == [row["prompt"] for row in heldout]
    assert split(tmp_path, SPLIT_ROWS, split_seed=1) != (train, heldout)


def test_a_split_is_pinned():
    _, heldout = split_rows([{"n": n} for n in range(12)], fraction=0.25, seed=0)
    assert heldout == [{"n": 3}, {"n": 4}, {"n": 9}]


def test_permutations_of_a_countdown_problem_stay_together(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"numbers": order, "target": 6 + n} for n in range(9) for order in ([1, 2, n + 3], [n + 3, 2, 1])]
    path.write_text(jsonl(rows))
    task = load_task(TaskConfig(name="countdown", data=path, heldout_fraction=0.3))
    assert len(task.heldout) == 6
    targets = [{row["target"] for row in part} for part in (task.train, task.heldout)]
    assert not targets[0] & targets[1]


def test_one_problem_cannot_be_split(tmp_path):
    with pytest.raises(UserError, match=r"task\.heldout_fraction: got 0\.25, which leaves no problem"):
        split(tmp_path, SPLIT_ROWS[:1])


def test_two_sources_of_heldout_problems_are_refused():
    with pytest.raises(ValueError, match="heldout_data is given as well"):
        TaskConfig(reward=REWARD, data="a", heldout_data="b", heldout_fraction=0.5)


@given(st.lists(st.integers(0, 5), min_size=1), st.floats(0.01, 0.99), st.integers(0, 3))
def test_any_split_keeps_every_row_once_and_equal_ones_together(numbers, fraction, seed):
    rows = [{"n": n} for n in numbers]
    train, heldout = split_rows(rows, fraction=fraction, seed=seed)
    assert heldout
    assert sorted(row["n"] for row in [*train, *heldout]) == sorted(numbers)
    assert not {row["n"] for row in train} & {row["n"] for row in heldout}


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.csv", "d.json"])
def test_a_packed_file_says_so(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b'{"prompt": "a"}\n'))
    with pytest.raises(UserError, match=r"is packed by gzip; unpack it"):
        read_rows(tmp_path / name, key="task.data", check=lambda row, where: None)


def test_a_range_is_rows_of_an_index(tmp_path):
    rows = read_rows(Path("range:3:6"), key="task.data", check=lambda row, where: None)
    assert rows == [{"index": 3}, {"index": 4}, {"index": 5}]
    assert rows[1].where == "task.data: range:3:6 index 4"
    renamed = read_rows(
        Path("range:0:1"), key="task.data", columns={"seed": "index"}, check=lambda row, where: None
    )
    assert renamed == [{"index": 0, "seed": 0}]


@pytest.mark.parametrize("source", ["range:", "range:5", "range:2:2", "range:3:1", "range:-1:2", "range:a:b"])
def test_what_is_no_range_is_refused(source):
    with pytest.raises(UserError, match=rf"task\.data: got {source}; wanted: range:START:STOP"):
        read_rows(Path(source), key="task.data", check=lambda row, where: None)
