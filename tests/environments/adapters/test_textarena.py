"""The adapter of TextArena, with the package itself, and without any word list but those made here."""

import re

import pytest

pytest.importorskip("textarena")

from shardes.environments.adapters.textarena import make
from shardes.environments.ambience import Ambience

# Games that need nothing but the package, and a completion that each understands.
_OFFLINE = {
    "2048-v0-ultra-easy": "[Up]",
    "Bandit-v0": "[red]",
    "Blackjack-v0": "[Hit]",
    "Cryptarithm-v0": "[A 1]",
    "FifteenPuzzle-v0": "[up]",
    "FrozenLake-v0-random": "[right]",
    "GuessTheNumber-v0": "[7]",
    "LightsOut-v0": "[1 1]",
    "Mastermind-v0": "[1 2 3 4]",
    "Minesweeper-v0-small": "[2 2]",
    "Secretary-v0": "[continue]",
    "Set-v0": "[0 1 2]",
    "Sokoban-v0": "[up]",
    "Sudoku-v0": "[1 1 5]",
    "TowerOfHanoi-v0": "[A C]",
}


def test_a_number_is_guessed_by_halves() -> None:
    environment = make("GuessTheNumber", {"max_number": 100})()
    said = environment.reset(index=3)
    assert "between 1 and 100" in said
    low, high = 1, 100
    for _turn in range(7):
        guess = (low + high) // 2
        said, reward, is_done = environment.step(f"Let me try [{guess}].")
        if is_done:
            break
        assert reward == 0 and str(guess) not in said  # the move is in the conversation already
        assert said.startswith("The target number is ")
        low, high = (guess + 1, high) if "higher" in said else (low, guess - 1)
    assert (reward, environment.numbers) == (1.0, {"success": 1.0, "invalid_move": 0.0})


def test_moves_that_are_none_end_a_game_with_its_own_reward() -> None:
    environment = make("GuessTheNumber-v0", {})()
    environment.reset(index=0)
    said, reward, is_done = environment.step("no idea")
    assert ("Invalid move format" in said, reward, is_done) == (True, 0.0, False)
    assert environment.step("none")[1:] == (0.0, True)
    assert environment.numbers == {"success": 0.0, "invalid_move": 1.0}


def test_a_word_without_brackets_is_a_move_as_in_the_games_default_variant() -> None:
    environment = make("GuessTheNumber", {})()
    environment.reset(index=0)
    assert "The target number is" in environment.step("1")[0] + environment.step("20")[0]


def test_a_row_replaces_arguments() -> None:
    environment = make("GuessTheNumber", {"max_number": 10})()
    assert "between 1 and 50" in environment.reset(index=0, max_number=50, max_turns=3)
    assert "within 10 turns" in environment.reset(index=0, max_turns=3)  # no argument that was given


def _journal(environment, index, move):
    ambience = Ambience(0)
    with ambience:
        said = environment.reset(index=index)
    yield said
    for _ in range(4):
        with ambience:
            result = environment.step(move)
        yield result
        if result[2]:
            return


@pytest.mark.parametrize("name", sorted(_OFFLINE))
def test_episodes_of_a_process_do_not_see_each_other(name: str) -> None:
    factory, move = make(name, {}), _OFFLINE[name]
    alone = [list(_journal(factory(), index, move)) for index in (1, 2)]
    together = [[], []]
    journals = [_journal(factory(), index, move) for index in (1, 2)]
    for _ in range(5):
        for results, journal in zip(together, journals, strict=True):
            results.extend(result for result in [next(journal, None)] if result is not None)
    assert together == alone
    if name in (
        "Blackjack-v0",
        "FifteenPuzzle-v0",
        "FrozenLake-v0-random",
        "Set-v0",
        "Sokoban-v0",
        "Sudoku-v0",
    ):
        assert alone[0][0] != alone[1][0]  # another index is another game


def test_a_game_with_word_lists_wants_them_here(tmp_path, monkeypatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(
        ValueError, match=r"Hangman-v0 .*word lists of NLTK.* python -m nltk.downloader words"
    ):
        make("Hangman", {})
    words = tmp_path / "corpora" / "words"
    words.mkdir(parents=True)
    (words / "README").write_text("none")
    for name in ("en", "en-basic"):
        (words / name).write_text("apple\n")
    environment = make("Hangman", {})()
    assert "_  _  _  _  _".replace(" ", "") in re.sub(r"\s", "", environment.reset(index=0))
    assert "A is in the word" in environment.step("[A]")[0]
    assert environment.step("[apple]")[1:] == (1.0, True)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("GuessTheNumbr", {}, r"Unknown game of TextArena: 'GuessTheNumbr'; nearest: GuessTheNumber-v0"),
        ("Sudoku-v0-train", {}, r"nearest: Sudoku-v0"),
        ("ConnectFour-v0", {}, r"only games of one player"),
        ("SpiteAndMalice-v0", {}, r"only games of one player|several players"),
        ("GuessTheNumber-v0", {"max_numbr": 3}, r"'max_numbr'; nearest: max_number"),
        ("GuessTheNumber-v0", {"seed": "x"}, r"seed is 'x'"),
    ],
)
def test_bad_names_and_arguments_are_told(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, arguments)
