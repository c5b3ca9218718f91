"""The desk: what becomes of requests whose process is killed, wherever that is."""

import pytest

from shardes.endpoint.desk import Desk
from shardes.endpoint.errors import ApiError
from shardes.endpoint.requests import Request
from shardes.endpoint.responses import Choice, Reply


class Asker:
    """An episode, whose answers are kept in ``got``."""

    def __init__(self, desk):
        self.desk, self.got = desk, []
        self.seat = desk.admit("m")
        desk.begin(self.seat.episode)

    def ask(self, text):
        request = Request("m", (text,), is_chat=False)
        return self.desk.ask(self.seat.episode, request, {"prompt": text}, self.got.append)

    def waiting(self):
        return [ask.request.prompts[0] for ask in self.desk.wait([self.seat.episode], 0) or []]


def reply(text):
    return Reply((Choice(text, "stop", 1),), num_prompt_tokens=1)


@pytest.fixture
def asker():
    return Asker(Desk())


@pytest.mark.parametrize("is_withdrawn", [False, True])
@pytest.mark.parametrize("moment", ["before it is answered", "before it asks again", "after it asks again"])
def test_an_answer_is_given_once_whenever_its_process_is_killed(asker, moment, is_withdrawn):
    desk, episode = asker.desk, asker.seat.episode
    desk.answer(asker.ask("a"), reply("1"))
    lost = asker.ask("b")
    if is_withdrawn:  # the connection is found closed before the process is found dead
        desk.withdraw(lost)
    if moment == "before it is answered":
        desk.answer(lost, reply("2"))
        desk.begin(episode)
    else:
        desk.begin(episode)
        if moment == "before it asks again":
            desk.answer(lost, reply("2"))
    asker.got.clear()
    asker.ask("a")
    assert [each.choices[0].text for each in asker.got] == ["1"]
    asker.ask("b")
    if moment == "after it asks again":
        assert asker.waiting() == ["b"]
        desk.answer(lost, reply("2"))
    assert [each.choices[0].text for each in asker.got] == ["1", "2"]
    assert asker.ask("c").number == 2
    assert asker.waiting() == ["c"]


def test_refusals_are_repeated_too(asker):
    desk = asker.desk
    desk.answer(asker.ask("a"), ApiError("no", code="x"))
    desk.answer(asker.ask("b"), reply("1"))
    desk.begin(asker.seat.episode)
    asker.got.clear()
    asker.ask("a")
    asker.ask("b")
    assert asker.got[0].code == "x"
    assert asker.got[1].choices[0].text == "1"


def test_an_episode_that_asks_something_else_the_second_time_is_refused(asker):
    asker.desk.answer(asker.ask("a"), reply("1"))
    asker.desk.begin(asker.seat.episode)
    with pytest.raises(ApiError) as refused:
        asker.ask("b")
    assert refused.value.code == "replay_diverged"


def test_an_episode_that_is_over_is_not_waited_for(asker):
    other = Asker(asker.desk)
    episodes = [asker.seat.episode, other.seat.episode]
    asker.ask("a")
    assert asker.desk.wait(episodes, 0) is None
    asker.desk.end(other.seat.episode)
    assert len(asker.desk.wait(episodes, 0)) == 1
    asker.desk.end(asker.seat.episode)
    assert asker.got[0].code == "episode_over"
    assert asker.desk.wait(episodes, 0) == []
    with pytest.raises(ApiError, match="over"):
        asker.ask("b")
