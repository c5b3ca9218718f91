"""Problems that are made: new, distinct, solvable, and the same for the same arguments."""

import json
from itertools import product

import pytest

from shardes.errors import UserError
from shardes.tasks.builtin import arithmetic, sudoku
from shardes.tasks.expression import evaluate_expression
from shardes.tasks.registry import TASKS
from tests.helpers.inprocess import call


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("task", ["arithmetic", "countdown", "sudoku"])
def test_make_data_writes_new_problems_that_the_task_accepts(tmp_path, task):
    train, heldout = tmp_path / "data" / "train.jsonl", tmp_path / "data" / "heldout.jsonl"
    result = call("shardes", "make-data", task, train, "--num-problems", "20")
    assert (result.returncode, result.stdout) == (0, f"{train}: 20 problems\n")
    # The same seed would give the same problems, were they not excluded.
    result = call("shardes", "make-data", task, heldout, "--num-problems", "30", "--exclude", train)
    assert result.returncode == 0, result.stderr
    rows = [rows_of(path) for path in (train, heldout)]
    for row in rows[0] + rows[1]:
        TASKS[task].check_row(row, "row")
    keys = [{TASKS[task].row_key(row) for row in part} for part in rows]
    assert [len(k) for k in keys] == [20, 30]
    assert not keys[0] & keys[1]
    before = heldout.read_bytes()
    for wrong in (["--exclude", tmp_path / "no"], ["--source", tmp_path]):
        result = call("shardes", "make-data", task, heldout, *wrong)
        assert result.returncode == 2
        assert result.stderr.startswith(f"Error: {wrong[0]}: ")
        assert result.stderr.count("\n") == 1
    assert heldout.read_bytes() == before


@pytest.mark.parametrize(
    ("generate", "first"),
    [
        (arithmetic.generate_problems, {"expression": "76 - 26 - 41", "answer": 9}),
        (
            sudoku.generate_puzzles,
            {
                "puzzle": [[4, 1, 2, 3], [3, 0, 0, 0], [0, 3, 4, 0], [2, 0, 3, 0]],
                "solution": [[4, 1, 2, 3], [3, 2, 1, 4], [1, 3, 4, 2], [2, 4, 3, 1]],
            },
        ),
    ],
)
def test_problems_are_pinned(generate, first):
    assert generate(1, seed=0) == [first]
    assert generate(30, seed=0)[:5] == generate(5, seed=0)
    assert generate(5, seed=1) != generate(5, seed=0)


def test_arithmetic_answers_are_right():
    rows = arithmetic.generate_problems(200, seed=0)
    assert all(evaluate_expression(row["expression"])[0] == row["answer"] for row in rows)
    assert {row["expression"].split()[1] for row in rows} == {"+", "-", "*"}


def solutions(puzzle):
    """All that agree with the puzzle, by trying: an independent solver of 4x4 Sudokus."""
    rows = [row for row in product(range(1, 5), repeat=4) if set(row) == {1, 2, 3, 4}]
    fits = [
        [row for row in rows if all(g in (0, c) for g, c in zip(given, row, strict=True))] for given in puzzle
    ]
    return [
        grid
        for grid in product(*fits)
        if all(len(set(column)) == 4 for column in zip(*grid, strict=True))
        and all(len({*a[i : i + 2], *b[i : i + 2]}) == 4 for a, b in (grid[:2], grid[2:]) for i in (0, 2))
    ]


def test_sudokus_have_exactly_one_solution():
    rows = sudoku.generate_puzzles(40, seed=7)
    for row in rows:
        (found,) = solutions(row["puzzle"])
        assert [list(line) for line in found] == row["solution"]
    empty = {sum(cell == 0 for line in row["puzzle"] for cell in line) for row in rows}
    assert empty <= set(range(4, 11))
    assert len(empty) > 4


def test_more_problems_than_there_are():
    with pytest.raises(UserError, match=r"found only 12 distinct expressions .* wanted: 13; ask for fewer"):
        arithmetic.generate_problems(13, seed=0, num_numbers=(2,), max_number=2)
    with pytest.raises(UserError, match=r"found only 288 distinct puzzles; wanted: 300; ask for fewer"):
        sudoku.generate_puzzles(300, seed=0, num_empty=(0,))


PUZZLE = {
    "train": [{"input": [[1, 0]], "output": [[0, 1]]}],
    "test": [{"input": [[2, 0]], "output": [[0, 2]]}, {"input": [[3, 0]], "output": [[0, 3]]}],
}


def test_arc_puzzles_are_converted_one_row_for_each_test(tmp_path):
    source = tmp_path / "puzzles"
    source.mkdir()
    (source / "b.json").write_text(json.dumps(PUZZLE))
    (source / "a.json").write_text(json.dumps(PUZZLE | {"test": PUZZLE["test"][:1]}))
    out = tmp_path / "arc.jsonl"
    result = call("shardes", "make-data", "arc", out, "--source", source)
    assert result.returncode == 0, result.stderr
    rows = rows_of(out)
    assert [row["id"] for row in rows] == ["a/0", "b/0", "b/1"]
    assert rows[2] == {"id": "b/1", "examples": PUZZLE["train"], "input": [[3, 0]], "output": [[0, 3]]}
    for row in rows:
        TASKS["arc"].check_row(row, "row")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no *.json files"),
        ("[", "a.json cannot be read as JSON"),
        ("[]", 'a.json: not a puzzle of the form {"train"'),
        (json.dumps(PUZZLE | {"test": [{"input": [[1]]}]}), "a.json test 0: column 'output' is missing"),
        (json.dumps(PUZZLE | {"train": []}), "a.json test 0: column 'examples' is []"),
    ],
)
def test_what_is_no_arc_puzzle_is_refused_by_its_file(tmp_path, content, words):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    result = call("shardes", "make-data", "arc", tmp_path / "out.jsonl", "--source", tmp_path)
    assert result.returncode == 2
    assert words in result.stderr
    assert not (tmp_path / "out.jsonl").exists()
