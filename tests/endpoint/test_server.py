"""The endpoint, asked by OpenAI's own client."""

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

from shardes.endpoint.errors import context_too_long  # noqa: E402
from shardes.endpoint.request_queue import RequestQueue  # noqa: E402
from shardes.endpoint.requests import SamplingSettings  # noqa: E402
from shardes.endpoint.responses import Choice, Reply  # noqa: E402
from shardes.endpoint.server import EndpointServer  # noqa: E402

USER = [{"role": "user", "content": "Hi"}]
MODEL = "shardes-member-12"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture
def queue():
    return RequestQueue()


@pytest.fixture
def server(queue):
    with EndpointServer(queue, SamplingSettings(0.0)) as server:
        yield server


@pytest.fixture
def credentials(queue):
    return queue.admit(MODEL)


@pytest.fixture
def client(server, credentials):
    with client_of(server, credentials) as client:
        yield client


def client_of(server, credentials, **others):
    return openai.OpenAI(
        base_url=server.url_of(credentials),
        api_key=others.pop("api_key", credentials.key),
        max_retries=0,
        **others,
    )


@contextlib.contextmanager
def answering(queue, credentials, reply):
    """Answer in lock-step until nobody lives; ``reply`` makes the answer to a request."""
    names = [credentials.episode for credentials in credentials]

    def serve():
        while asks := queue.wait(names, 30):
            for ask in asks:
                queue.answer(ask, reply(ask))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        for name in names:
            queue.end(name)
        thread.join(30)
        assert not thread.is_alive()


def said(text, **others):
    return Reply((Choice(text, others.pop("finish_reason", "stop"), 3, **others),), num_prompt_tokens=5)


def test_a_chat_is_answered(queue, credentials, client):
    with answering(queue, [credentials], lambda ask: said(ask.request.prompts[0][0]["content"] + "!")):
        answer = client.chat.completions.create(model=MODEL, messages=USER, max_completion_tokens=7)
        second = client.chat.completions.create(model="shardes", messages=USER)
    assert answer.choices[0].message.content == "Hi!"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.model, second.model) == (MODEL, MODEL)
    assert (answer.id, second.id) == ("chatcmpl-0", "chatcmpl-1")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        5,
        3,
        8,
    )


def test_texts_are_completed_each_so_often(queue, credentials, client):
    def reply(ask):
        request = ask.request
        assert (request.num_choices, request.seed, request.stop, request.max_tokens) == (2, 5, ("x",), 4)
        texts = [f"{prompt}{i}" for prompt in request.prompts for i in range(request.num_choices)]
        return Reply(tuple(Choice(text, "length", 4) for text in texts), num_prompt_tokens=2)

    with answering(queue, [credentials], reply):
        answer = client.completions.create(
            model=MODEL, prompt=["a", "b"], n=2, seed=5, stop="x", max_tokens=4
        )
    assert [choice.text for choice in answer.choices] == ["a0", "a1", "b0", "b1"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16


def test_tools_are_called_and_the_calls_come_back(queue, credentials, client):
    def reply(ask):
        messages = ask.request.prompts[0]
        if messages[-1]["role"] == "tool":
            assert messages[-2]["tool_calls"][0]["function"]["arguments"] == {"x": "é"}
            return said("done")
        calls = (("add", {"x": "é"}), ("add", {}))
        return said("", finish_reason="tool_calls", tool_calls=calls)

    with answering(queue, [credentials], reply):
        message = client.chat.completions.create(model=MODEL, messages=USER, tools=[TOOL]).choices[0].message
        first, second = message.tool_calls
        told = {"role": "tool", "tool_call_id": first.id, "content": "3"}
        last = client.chat.completions.create(model=MODEL, messages=[*USER, message, told], tools=[TOOL])
    assert (first.function.name, json.loads(first.function.arguments)) == ("add", {"x": "é"})
    assert message.content is None
    assert first.id != second.id
    assert len(first.id) == 9
    assert last.choices[0].message.content == "done"


def test_a_stream_has_each_answer_in_one_piece(queue, credentials, client):
    calls = (("add", {"x": 1}),)
    with answering(queue, [credentials], lambda _: said("Hm", finish_reason="tool_calls", tool_calls=calls)):
        chunks = list(
            client.chat.completions.create(
                model=MODEL, messages=USER, tools=[TOOL], stream=True, stream_options={"include_usage": True}
            )
        )
        texts = list(client.completions.create(model=MODEL, prompt="a", stream=True))
    assert [chunk.choices[0].delta.content for chunk in chunks[:2]] == ["Hm", None]
    assert chunks[0].choices[0].delta.tool_calls[0].index == 0
    assert chunks[1].choices[0].finish_reason == "tool_calls"
    assert chunks[2].usage.total_tokens == 8
    assert [chunk.choices[0].text for chunk in texts] == ["Hm"]


def test_models(server, queue, credentials, client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve("shardes").id == MODEL
    with pytest.raises(openai.NotFoundError, match=MODEL):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4o", messages=USER)
    assert unknown.value.body["code"] == "model_not_found"


def test_refusals_have_openais_shape(queue, credentials, client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=USER, logprobs=True)
    assert refused.value.body["param"] == "logprobs"
    with (
        answering(queue, [credentials], lambda _: context_too_long(9, 8, param="messages")),
        pytest.raises(openai.BadRequestError) as refused,
    ):
        client.chat.completions.create(model=MODEL, messages=USER)
    assert refused.value.body["code"] == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="a", encoding_format="float")


def test_an_episode_is_reached_by_its_own_key_alone(server, queue, credentials):
    other = queue.admit(MODEL)
    for asked, key in ((credentials, other.key), (credentials, "x"), (other, credentials.key)):
        with client_of(server, asked, api_key=key) as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
    queue.end(other.episode)
    with client_of(server, other) as client, pytest.raises(openai.AuthenticationError, match="over"):
        client.models.list()


def test_bodies_that_are_no_json_are_refused(server, credentials):
    for body in (b"{", b"[]", b"null"):
        with (
            client_of(server, credentials) as client,
            pytest.raises(openai.BadRequestError, match="the body"),
        ):
            client.post(
                "/chat/completions",
                content=body,
                cast_to=object,
                options={"headers": {"content-type": "application/json"}},
            )


def test_eight_episodes_are_answered_in_lock_step(server, queue):
    credentials = [queue.admit(f"shardes-member-{i}") for i in range(8)]
    num_turns = [3, 1, 4, 2, 5, 2, 3, 1]
    turns = []

    def play(i):
        with client_of(server, credentials[i]) as client:
            said = []
            for turn in range(num_turns[i]):
                time.sleep(0.01 * ((i * 5 + turn * 3) % 8))  # they come in any order
                answer = client.chat.completions.create(
                    model=f"shardes-member-{i}", messages=[{"role": "user", "content": f"{i}.{turn}"}]
                )
                said.append(answer.choices[0].message.content)
            queue.end(credentials[i].episode)
            return said

    with ThreadPoolExecutor(8) as threads:
        playing = [threads.submit(play, i) for i in reversed(range(8))]
        while asks := queue.wait([credentials.episode for credentials in credentials], 30):
            turns.append([ask.request.prompts[0][0]["content"] for ask in asks])
            for ask in asks:
                queue.answer(ask, said(f"to {ask.request.prompts[0][0]['content']}"))
        found = [future.result() for future in reversed(playing)]
    assert turns == [[f"{i}.{turn}" for i in range(8) if turn < num_turns[i]] for turn in range(5)]
    assert found == [[f"to {i}.{turn}" for turn in range(num_turns[i])] for i in range(8)]


def test_who_asks_several_things_at_once_is_answered_together(server, queue, credentials):
    with client_of(server, credentials) as client, ThreadPoolExecutor(2) as threads:

        def ask(text):
            return client.completions.create(model=MODEL, prompt=text)

        first = threads.submit(ask, "a")
        assert queue.wait([credentials.episode], 30)
        second = threads.submit(ask, "b")
        while len(asks := queue.wait([credentials.episode], 30)) < 2:
            time.sleep(0.01)
        assert [ask.request.prompts[0] for ask in asks] == ["a", "b"]
        for ask in asks:
            queue.answer(ask, said(ask.request.prompts[0]))
        assert [future.result().choices[0].text for future in (first, second)] == ["a", "b"]


def test_a_client_that_gives_up_is_not_waited_for(server, queue, credentials):
    with client_of(server, credentials, timeout=0.3) as client, pytest.raises(openai.APITimeoutError):
        client.completions.create(model=MODEL, prompt="a")
    deadline = time.monotonic() + 30
    while queue.wait([credentials.episode], 0) is not None:
        assert time.monotonic() < deadline
    assert queue.idle_seconds(credentials.episode) is not None


def test_the_time_of_waiting_for_an_answer_does_not_count(server, queue, credentials):
    queue.begin(credentials.episode)
    with client_of(server, credentials) as client, ThreadPoolExecutor(1) as threads:
        asking = threads.submit(client.completions.create, model=MODEL, prompt="a")
        (ask,) = queue.wait([credentials.episode], 30)
        assert queue.idle_seconds(credentials.episode) is None
        time.sleep(0.5)
        queue.answer(ask, said("b"))
        asking.result()
    assert queue.end(credentials.episode) < 0.5


def test_nobody_else_reaches_the_endpoint(server):
    assert server._socket.getsockname()[0] == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.port), timeout=5)


def test_closing_answers_those_who_wait(queue, credentials):
    server = EndpointServer(queue, SamplingSettings(0.0))
    with client_of(server, credentials) as client, ThreadPoolExecutor(1) as threads:
        asking = threads.submit(client.completions.create, model=MODEL, prompt="a")
        assert queue.wait([credentials.episode], 30)
        server.close()
        with pytest.raises(openai.APIStatusError, match="over"):
            asking.result(30)


def test_an_episode_that_is_begun_again_gets_the_same_answers(server, queue, credentials):
    def ask(client, text):
        return client.completions.create(model=MODEL, prompt=text, max_tokens=1).choices[0].text

    with ThreadPoolExecutor(1) as threads, client_of(server, credentials) as client:
        queue.begin(credentials.episode)
        asking = threads.submit(ask, client, "a")
        queue.answer(queue.wait([credentials.episode], 30)[0], said("first"))
        asking.result(30)
        asking = threads.submit(ask, client, "b")
        (lost,) = queue.wait([credentials.episode], 30)
        queue.begin(credentials.episode)  # while its second answer is generated
        with pytest.raises(openai.APIStatusError, match="over"):
            asking.result(30)
        assert ask(client, "a") == "first"
        again = threads.submit(ask, client, "b")
        (waiting,) = queue.wait([credentials.episode], 30)
        assert (waiting.number, waiting is lost) == (1, False)
        queue.answer(lost, said("second"))
        queue.answer(lost, said("never"))
        assert again.result(30) == "second"
        queue.begin(credentials.episode)
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, "c")
    assert refused.value.body["code"] == "replay_diverged"
    queue.end(credentials.episode)
