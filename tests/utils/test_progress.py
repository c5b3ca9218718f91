"""What long work says while it goes on."""

import io
import logging
import re

import pytest

from shardes.utils.progress import duration, progress


def test_long_work_tells_now_and_then_how_far_it_is(monkeypatch, caplog):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("shardes.utils.progress.time.monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, logger="shardes.utils.progress"):
        assert list(progress("abcdefgh", what="loading", total=8, unit="parts")) == list("abcdefgh")
    # One item takes 4 seconds: a line after 12, of what is done, and then every 12.
    assert [r.getMessage() for r in caplog.records] == [
        "loading: 2 of 8 parts, about 36 s left",
        "loading: 5 of 8 parts, about 14 s left",
    ]


def test_on_a_terminal_it_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("shardes.utils.progress._SECONDS_BEFORE_BAR", 0)
    assert list(progress("abc", what="loading", total=3, unit="parts")) == list("abc")
    assert re.search(r"loading: +\d+%\|.*/3 ", terminal.getvalue())


def test_other_ranks_and_short_work_say_nothing(monkeypatch, caplog):
    with caplog.at_level(logging.INFO, logger="shardes.utils.progress"):
        assert list(progress(range(3), what="loading", total=3, unit="parts")) == [0, 1, 2]
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setattr("shardes.utils.progress.time.monotonic", iter(range(0, 9000, 100)).__next__)
        assert list(progress(range(3), what="loading", total=3, unit="parts")) == [0, 1, 2]
    assert not caplog.records


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (99.4, "99 s"),
        (100, "2 min"),
        (3569, "59 min"),
        (3600, "1 h"),
        (12000, "3 h 20 min"),
        (172800, "2 d"),
        (360000, "4 d 4 h"),
    ],
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text
