"""Harnesses for tests: a row's ``do`` says what one does."""

import asyncio
import os
import signal
import time
from pathlib import Path

import openai

MODEL = "shardes"


async def said(client, text, **others):
    answer = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": text}], **others
    )
    return answer.choices[0].message.content


async def play(row, client, *, factor=1.0):
    """Ask ``turns`` times, each time with the answer of the time before."""
    text = row.get("text", "go")
    for turn in range(row.get("turns", 1)):
        if row.get("at") == turn:
            await misbehave(row["do"], row.get("mark"))
        await asyncio.sleep(row.get("pause", 0))
        text = await said(client, text)
    return factor * sum(map(ord, text))


async def misbehave(what, mark):
    if what == "once":  # ends its process, the first time only
        if not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "exit":
        os._exit(3)
    elif what == "hang":
        time.sleep(1000)
    elif what == "wait":
        await asyncio.sleep(1000)
    elif what == "raise":
        raise ValueError("no luck")
    elif what == "thread":
        import threading

        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()


async def give(row, client, **_):
    """Return something."""
    return {"text": "1", "none": None, "nan": float("nan"), "true": True}[row["give"]]


def by_environment(row, client, **_):
    """Ask with a client made of the environment's variables, in a function that is no coroutine."""
    with openai.OpenAI(max_retries=0) as own:
        answer = own.chat.completions.create(
            model=os.environ["OPENAI_MODEL"], messages=[{"role": "user", "content": row["text"]}]
        )
    return float(len(answer.choices[0].message.content))


async def to_the_limit(row, client, **_):
    """Ask until that is refused, and return how often it was not."""
    messages = []
    for turn in range(100):
        messages.append({"role": "user", "content": row["text"]})
        try:
            answer = await client.chat.completions.create(model=MODEL, messages=messages)
        except openai.BadRequestError as error:
            assert error.code == row["code"], error.code
            return turn
        messages.append(answer.choices[0].message)
    return -1


async def several(row, client):
    """Have several answers, by seeds and without."""
    answer = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}], n=3, **row["how"]
    )
    return float(len({choice.message.content for choice in answer.choices}))


async def stopped(row, client, **_):
    """Return the length of an answer that ends before some texts."""
    return float(len(await said(client, "x", stop=row["stop"])))


async def with_tool(row, client, **_):
    """Have the model add, by a tool."""
    function = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    messages = [{"role": "user", "content": "3 and 4?"}]
    answer = await client.chat.completions.create(
        model=MODEL, messages=messages, tools=[{"type": "function", "function": function}]
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls", choice
    (call,) = choice.message.tool_calls
    told = {"role": "tool", "tool_call_id": call.id, "content": call.function.arguments}
    answer = await client.chat.completions.create(model=MODEL, messages=[*messages, choice.message, told])
    return float(len(answer.choices[0].message.content))


async def any_of(row, client, **arguments):
    """Do what a row says by the name of a function."""
    found = globals()[row.get("play", "play")](row, client, **arguments)
    return found if isinstance(found, float) else await found


def takes_nothing():
    """Be called with too much."""
