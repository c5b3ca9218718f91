"""The queue: what becomes of requests whose process is killed, wherever that is."""

import pytest

from shardes.endpoint.errors import ApiError
from shardes.endpoint.request_queue import RequestQueue
from shardes.endpoint.requests import Request
from shardes.endpoint.responses import Choice, Reply


class Asker:
    """An episode, whose answers are kept in ``got``."""

    def __init__(self, queue):
        self.queue, self.got = queue, []
        self.credentials = queue.admit("m")
        queue.begin(self.credentials.episode)

    def ask(self, text):
        request = Request("m", (text,), is_chat=False)
        return self.queue.ask(self.credentials.episode, request, {"prompt": text}, self.got.append)

    def waiting(self):
        return [ask.request.prompts[0] for ask in self.queue.wait([self.credentials.episode], 0) or []]


def reply(text):
    return Reply((Choice(text, "stop", 1),), num_prompt_tokens=1)


@pytest.fixture
def asker():
    return Asker(RequestQueue())


@pytest.mark.parametrize("is_withdrawn", [False, True])
@pytest.mark.parametrize("moment", ["before it is answered", "before it asks again", "after it asks again"])
def test_an_answer_is_given_once_whenever_its_process_is_killed(asker, moment, is_withdrawn):
    queue, episode = asker.queue, asker.credentials.episode
    queue.answer(asker.ask("a"), reply("1"))
    lost = asker.ask("b")
    if is_withdrawn:  # the connection is found closed before the process is found dead
        queue.withdraw(lost)
    if moment == "before it is answered":
        queue.answer(lost, reply("2"))
        queue.begin(episode)
    else:
        queue.begin(episode)
        if moment == "before it asks again":
            queue.answer(lost, reply("2"))
    asker.got.clear()
    asker.ask("a")
    assert [each.choices[0].text for each in asker.got] == ["1"]
    asker.ask("b")
    if moment == "after it asks again":
        assert asker.waiting() == ["b"]
        queue.answer(lost, reply("2"))
    assert [each.choices[0].text for each in asker.got] == ["1", "2"]
    assert asker.ask("c").number == 2
    assert asker.waiting() == ["c"]


def test_refusals_are_repeated_too(asker):
    queue = asker.queue
    queue.answer(asker.ask("a"), ApiError("no", code="x"))
    queue.answer(asker.ask("b"), reply("1"))
    queue.begin(asker.credentials.episode)
    asker.got.clear()
    asker.ask("a")
    asker.ask("b")
    assert asker.got[0].code == "x"
    assert asker.got[1].choices[0].text == "1"


def test_an_episode_that_asks_something_else_the_second_time_is_refused(asker):
    asker.queue.answer(asker.ask("a"), reply("1"))
    asker.queue.begin(asker.credentials.episode)
    with pytest.raises(ApiError) as refused:
        asker.ask("b")
    assert refused.value.code == "replay_diverged"


def test_an_episode_that_is_over_is_not_waited_for(asker):
    other = Asker(asker.queue)
    episodes = [asker.credentials.episode, other.credentials.episode]
    asker.ask("a")
    assert asker.queue.wait(episodes, 0) is None
    asker.queue.end(other.credentials.episode)
    assert len(asker.queue.wait(episodes, 0)) == 1
    asker.queue.end(asker.credentials.episode)
    assert asker.got[0].code == "episode_over"
    assert asker.queue.wait(episodes, 0) == []
    with pytest.raises(ApiError, match="over"):
        asker.ask("b")
