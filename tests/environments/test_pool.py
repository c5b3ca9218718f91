"""Environments in processes of their own: what an episode does there harms no other, and loses no bit."""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from shardes.environments import starting
from shardes.environments.base import EnvironmentSpec
from shardes.environments.in_process import InProcessEnvironments
from shardes.environments.pool import EnvironmentPool, make_environment_runner
from shardes.environments.record import Record
from shardes.errors import UserError
from tests.helpers.ranks import ROOT

FILE = "tests/helpers/hostile_environments.py"
HOSTILE = EnvironmentSpec(f"{FILE}:Hostile", {"scale": 2.0})
WAITING = EnvironmentSpec(f"{FILE}:Waiting", {"scale": 2.0})
LIMIT = 1.0


def pool(spec=HOSTILE, *, timeout_seconds=LIMIT, max_workers=2, memory_bytes=None, may_isolate=False):
    return EnvironmentPool(
        spec,
        timeout_seconds=timeout_seconds,
        max_workers=max_workers,
        memory_bytes=memory_bytes,
        may_isolate=may_isolate,
    )


def rows(num_episodes):
    return [{"start": i} for i in range(num_episodes)]


def said(results):
    return [(each.observation, each.reward, each.is_done, each.failure) for each in results]


def play(runner, num_episodes=6, *, say=None, until=10):
    """Play episodes in lock step; return the results of each, from its reset on.

    Args:
        say: Completions by episode and turn, where they are not plain.
    """
    episodes = runner.begin(rows(num_episodes))
    results = [[episode.wait()] for episode in episodes]
    for turn in range(1, until + 1):
        living = [i for i, told in enumerate(results) if told[-1].failure is None and not told[-1].is_done]
        for i in living:
            episodes[i].step((say or {}).get((i, turn), "x" * (i + turn)))
        for i in living:
            results[i].append(episodes[i].wait())
    for episode in episodes:
        episode.close()
        episode.close()
    return [said(told) for told in results]


@pytest.fixture(scope="module")
def undisturbed():
    with InProcessEnvironments(HOSTILE) as runner:
        return play(runner, 64)


@pytest.fixture(scope="module")
def shared():
    with pool(memory_bytes=2**31) as runner:
        yield runner


def settled_kills(runner):
    """The number of kills once it stays as it is: some processes are ended after their answers."""
    found = None
    while found != (found := runner.num_kills):
        time.sleep(0.3)
    return found


@pytest.mark.parametrize(("spec", "may_isolate"), [(HOSTILE, True), (WAITING, False)])
def test_episodes_go_as_in_this_process(undisturbed, spec, may_isolate):
    with pool(spec, may_isolate=may_isolate) as runner:
        assert play(runner, 64) == undisturbed
        assert runner.num_kills == 0


def test_coroutines_in_this_process_are_the_same_also_in_a_loop(undisturbed):
    async def within():
        return play(runner, 6)

    with InProcessEnvironments(WAITING) as runner:
        assert play(runner, 6) == undisturbed[:6]
        assert asyncio.run(within()) == undisturbed[:6]


@pytest.mark.parametrize(
    ("command", "words", "num_kills"),
    [
        ("hang", "TimeoutError: the environment did not answer within 1 s (task.reward_timeout_seconds)", 1),
        ("fork and wait", None, 0),
        ("exit:3", "the environment ended its process (exit status 3), 3 times in all", 3),
        ("crash", "the environment ended its process (signal 11), 3 times in all", 3),
        ("kill", "the environment ended its process (signal 9), 20 times in all", 20),
        ("close all", "the environment ended its process (exit status 1), 3 times in all", 3),
        ("close all and hang", "the environment closed its process's connection, 3 times in all", 3),
        ("interrupt", "KeyboardInterrupt:  (", 0),
        ("raise:no such key", "LookupError: no such key (", 0),
        ("fill:4000000000", "MemoryError", 2),
        ("fork", None, 0),
        ("fork and hang", None, 0),
        ("print:loud", None, 0),
        ("alarm", None, 0),
        ("run a loop", None, 0),
        ("when closed:hang", None, 1),
        ("when closed:exit:2", None, 1),
        ("when closed:raise:it", None, 0),
        ("forge:{}", "the environment broke its process (KeyError: 'id'), 3 times in all", 3),
        ("forge:not json", "the environment broke its process (JSONDecodeError", 3),
        ('forge:{"id": 1000}', "the environment broke its process (ValueError: a reply to nothing", 3),
    ],
)
def test_an_episode_that_breaks_its_process_fails_alone(shared, undisturbed, command, words, num_kills):
    num_before = settled_kills(shared)
    results = play(shared, say={(2, 4): command})
    others = [0, 1, 3, 4, 5]
    assert [results[i] for i in others] == [undisturbed[i] for i in others]
    assert results[2][:4] == undisturbed[2][:4]
    if words is None:
        assert [row[3] for row in results[2]] == [None] * 11
    else:
        assert words in results[2][4][3]
        assert len(results[2]) == 5
    assert play(shared) == undisturbed[:6]
    deadline = time.monotonic() + 20
    while shared.num_kills < num_before + num_kills and time.monotonic() < deadline:
        time.sleep(0.01)  # some are closed still
    assert settled_kills(shared) == num_before + num_kills


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("leave:now", "SystemExit: now ("),
        ("return:5", "TypeError: step returned 5 (int); wanted (observation, reward, done) (in step)"),
        ("return:('a', 1.0)", "TypeError: step returned ('a', 1.0) (tuple); wanted (observation, rew"),
        ("return:('a', float('nan'), False)", "ValueError: step returned nan (float) as reward, which is"),
        ("return:('a', None, False)", "ValueError: step returned None (NoneType) as reward, which is no"),
        ("return:('a', 1, 'no')", "TypeError: step returned 'no' (str) as done; wanted True or False"),
        (
            "return:(5, 1, False)",
            "TypeError: step returned 5 (int) as observation; wanted text",
        ),
        ("return:([{'role': 'user'}], 1, False)", "TypeError: step returned [{'role': 'user'}] (list) as"),
        ("deep:60", "TypeError: step returned a message of more than 50 levels in each other"),
        ("deep:5000", "TypeError: step returned a message that cannot be sent on (maximum recursion depth"),
    ],
)
def test_what_a_step_returns_is_checked(shared, command, words):
    with InProcessEnvironments(HOSTILE) as here:
        for runner in (here, shared):
            ((_, (observation, reward, is_done, failure)),) = play(runner, 1, say={(0, 1): command})
            assert (observation, reward, is_done) == ("", 0.0, False)
            assert failure.startswith(words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("hang", "TimeoutError"),
        ("exit:3", "(exit status 3), 3 times"),
        ("raise:it", "LookupError: it"),
        ("return:5", "TypeError: reset returned 5 (int) as observation; wanted text, or a list of messages"),
    ],
)
def test_a_reset_is_limited_as_a_step_is(shared, undisturbed, command, words):
    bad, good = shared.begin([{"start": 0, "do": command}, {"start": 1}])
    assert words in bad.wait().failure
    assert said([good.wait()]) == undisturbed[1][:1]
    bad.step("x")
    assert bad.wait().failure == "the episode is over"
    bad.close()


@pytest.mark.parametrize("command", ["hang", "exit:3"])
def test_a_coroutine_that_keeps_others_waiting_fails_alone(undisturbed, command):
    with pool(WAITING) as runner:
        results = play(runner, say={(2, 4): command, (3, 4): "wait:0.3", (4, 4): "wait:0.3"}, until=5)
        assert [row[3] for row in results[3]] == [None] * 6
        assert results[2][-1][3] is not None
        for i in (0, 1, 5):
            assert results[i] == undisturbed[i][:6]


def test_coroutines_run_at_the_same_time_and_each_has_its_limit():
    with pool(WAITING, max_workers=1) as runner:
        say = {(i, 1): "wait:0.5" for i in range(8)} | {(3, 1): "wait for ever"}
        results = play(runner, 8, say=say, until=1)
        assert [row[-1][3] is None for row in results] == [i != 3 for i in range(8)]


def test_a_limit_counts_from_when_a_step_begins():
    with pool(max_workers=1) as runner:
        results = play(runner, 4, say={(i, 1): "sleep:0.6" for i in range(4)}, until=1)
        assert [row[-1][3] for row in results] == [None] * 4
        assert runner.num_kills == 0


def test_a_process_that_ends_by_chance_costs_nothing(undisturbed, tmp_path):
    with pool(max_workers=1) as runner:
        results = play(runner, say={(2, 4): f"exit alone:{tmp_path / 'seen'}"})
        assert [row[3] for row in results[2]] == [None] * 11
        assert [r for i, r in enumerate(results) if i != 2] == [undisturbed[i] for i in (0, 1, 3, 4, 5)]


def test_a_process_that_ends_between_steps_costs_nothing(undisturbed):
    with pool(max_workers=1) as runner:
        (episode,) = runner.begin([{"start": 0}])
        results = [episode.wait()]
        for turn in range(1, 11):
            os.kill(runner._hosts._hosts[0].pid, signal.SIGKILL)
            time.sleep(0.02)
            episode.step("x" * turn)
            results.append(episode.wait())
        assert said(results) == undisturbed[0]
        assert runner.num_kills >= 10


def test_a_fork_server_that_is_killed_costs_nothing(undisturbed):
    with pool() as runner:

        def kill():
            os.kill(runner._hosts._starter.fork_server._process.pid, signal.SIGKILL)

        timer = threading.Timer(0.05, kill)
        timer.start()
        assert play(runner, 64) == undisturbed
        timer.join()
        assert play(runner, 64) == undisturbed


def test_an_episode_that_answers_otherwise_when_begun_again_has_failed():
    with pool() as runner:
        (episode,) = runner.begin([{"start": 0}])
        episode.wait()
        episode.step("draw")
        assert episode.wait().failure is None
        os.kill(runner._hosts._hosts[0].pid, signal.SIGKILL)
        episode.step("x")
        failure = episode.wait().failure
        assert failure.startswith("the environment is not deterministic: begun again after its process was")
        assert "call 1 otherwise" in failure


def test_an_episode_whose_memory_others_have_is_played_by_itself(undisturbed):
    with pool(max_workers=1, memory_bytes=300 * 2**20) as runner:
        say = {(i, 3): f"keep:{70 * 2**20}" for i in range(6)}
        results = play(runner, say=say)
        assert [row[-1][3] for row in results] == [None] * 6
        assert runner.num_kills > 0
        assert play(runner) == undisturbed[:6]


def test_what_an_episode_sets_is_its_own(tmp_path):
    with pool(max_workers=1) as runner:
        results = play(
            runner, 2, say={(0, 1): f"enter:{tmp_path}", (0, 2): "where", (1, 2): "where"}, until=2
        )
        assert results[0][2][0] == f"{tmp_path} {tmp_path}"
        assert results[1][2][0] == f"{Path.cwd()} None"
    state = random.getstate()
    with InProcessEnvironments(HOSTILE) as runner:
        results = play(runner, 1, say={(0, 1): f"enter:{tmp_path}", (0, 2): "where"}, until=2)
    assert results[0][2][0] == f"{tmp_path} {tmp_path}"
    assert random.getstate() == state
    assert "ENTERED" not in os.environ


def test_a_worker_without_standard_output_is_replaced(undisturbed):
    with pool(max_workers=1) as runner:
        results = play(runner, say={(2, 4): "close output"})
        assert [row[3] for row in results[2]] == [None] * 11
        assert results[3] == undisturbed[3]
        assert runner.num_kills > 0


def test_rows_may_hold_anything_that_can_be_pickled():
    spec = EnvironmentSpec(f"{FILE}:Any")
    with pool(spec) as runner:
        episodes = runner.begin([{"a": [1, None]}, {"a": lambda: 0}, {"a": {1, 2}}])
        good, unsent, unshown = [episode.wait() for episode in episodes]
        assert good.observation == '{"a": [1, null]}'
        assert unsent.failure.startswith("a column cannot be sent to it (")
        assert unshown.failure.startswith("TypeError: Object of type set")


def test_columns_that_reset_does_not_take_stay_here():
    spec = EnvironmentSpec(f"{FILE}:Keen", {"scale": 0.5})
    for make in (pool, InProcessEnvironments):
        with make(spec) as runner:
            episodes = runner.begin([{"a": 1, "c": lambda: 0}, {"b": 1}])
            assert episodes[0].wait().observation == "1 2"
            assert episodes[1].wait().failure == "the row has no column 'a', which reset needs; it has b"
            episodes[0].step("x", message={"role": "assistant", "content": "x"})
            told = episodes[0].wait()
            assert (told.observation, told.reward) == ('{"role": "assistant", "content": "x"}', 0.5)
            episodes[0].finish()
            told = episodes[0].wait()
            assert (told.reward, told.is_done) == (7.5, True)


def test_numbers_and_time_are_reported():
    with pool() as runner:
        (episode,) = runner.begin([{"start": 0}])
        assert episode.wait().numbers == {"turns": 0.0}
        episode.step("sleep:0.1")
        told = episode.wait()
        assert told.numbers == {"turns": 1.0}
        assert 0.1 <= told.seconds < 10


def test_steps_that_take_long_have_more_processes():
    with pool(max_workers=4) as runner:
        for _ in range(3):
            results = play(runner, 16, say={(i, 1): "sleep:0.05" for i in range(16)}, until=1)
        assert all(row[-1][3] is None for row in results)
        assert runner._hosts._num_processes == 4


def test_an_episode_that_is_given_up_frees_its_environment():
    with pool(max_workers=1) as runner:
        episodes = runner.begin(rows(3))
        [episode.wait() for episode in episodes]
        for episode in episodes:
            episode.step("sleep:0.05")
            episode.close()
            assert episode.wait().failure in (None, "the episode was given up")
        (last,) = runner.begin([{"start": 0}])
        last.wait()
        last.step("return:(str(CLOSED), 0.0, False)")
        assert last.wait().observation == "[0, 1, 2]"


def test_nobody_waits_for_a_pool_that_is_closed():
    runner = pool(timeout_seconds=1000)
    hanging, idle = runner.begin(rows(2))
    hanging.wait(), idle.wait()
    hanging.step("hang")
    told = []
    waiting = threading.Thread(target=lambda: told.append(hanging.wait().failure))
    waiting.start()
    runner.close()
    runner.close()
    waiting.join(20)
    assert told == ["the episode was given up"]
    idle.step("x")
    assert idle.wait().failure == "the environments were closed"


def test_tools_are_called_in_the_process():
    with pool(EnvironmentSpec(tools=(f"{FILE}:add",)), timeout_seconds=30) as runner:
        assert [tool["function"]["name"] for tool in runner.tools] == ["add"]
        (episode,) = runner.begin([{"prompt": "What is 2 + 3?"}])
        assert episode.wait().observation == "What is 2 + 3?"
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
        episode.step("text", message={"role": "assistant", "content": "", "tool_calls": [call]})
        told = episode.wait()
        assert told.observation == [{"role": "tool", "name": "add", "content": "5"}]
        assert told.numbers["tool_calls"] == 1
        episode.finish()
        assert episode.wait().is_done


FORKING = f"""
from shardes.environments.base import EnvironmentSpec
from shardes.environments.in_process import InProcessEnvironments
(episode,) = InProcessEnvironments(EnvironmentSpec("{FILE}:Hostile")).begin([{{"start": 0}}])
episode.step("fork")
print(episode.wait().observation, flush=True)
"""


def test_a_child_never_answers_also_in_this_process():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", FORKING], capture_output=True, text=True, env=environment, timeout=60, cwd=ROOT
    )
    assert result.stdout == "turn 1 of 0: 0.8444218515250481\n"


def test_a_mistake_in_the_pool_itself_keeps_nobody_waiting(monkeypatch, undisturbed):
    with pool() as runner:
        monkeypatch.setattr(Record, "answer", lambda self, result: 1 / 0)
        runner._hosts._handle_end = lambda host, reason: 1 / 0
        (episode,) = runner.begin(rows(1))
        assert episode.wait().failure == (
            "the pool of environments broke down (ZeroDivisionError('division by zero'))"
        )


def limits(**changes):
    usual = {"reward_workers": 1, "reward_timeout_seconds": 5, "reward_memory_bytes": None}
    return SimpleNamespace(**(usual | {"reward_isolation": "none"} | changes))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_environment_that_cannot_be_made_is_refused(num_workers):
    with pytest.raises(UserError) as caught:
        make_environment_runner(limits(reward_workers=num_workers), EnvironmentSpec(f"{FILE}:Nobody"))
    assert str(caught.value) == f"task.environment: {FILE} has no class 'Nobody'"
    with pytest.raises(UserError) as caught:
        spec = EnvironmentSpec(f"{FILE}:Keen", {"sale": 1})
        make_environment_runner(limits(reward_workers=num_workers), spec, key="eval.sets.x")
    assert str(caught.value).startswith("eval.sets.x.environment_arguments: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import os; os._exit(4)", "importing it ended the process (exit status 4)"),
        ("import time; time.sleep(1000)", "importing it took longer than 0.5 s"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_an_environment_that_cannot_be_imported_is_refused(tmp_path, monkeypatch, text, words):
    monkeypatch.setattr(starting, "IMPORT_SECONDS", 0.5)
    path = tmp_path / "game.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        make_environment_runner(limits(), EnvironmentSpec(f"{path}:f"))
    assert str(caught.value).startswith("task.environment: ")
    assert words in str(caught.value)


def kill_at_random(runner, num_kills, stop, *, pause, seed):
    """Kill workers, ready or not, at random moments; return how many."""
    draw = random.Random(seed)
    num_done = 0
    while num_done < num_kills and not stop.is_set():
        time.sleep(draw.uniform(0.0, 2 * pause))
        server = runner._hosts._starter.fork_server._process.pid
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        with contextlib.suppress(OSError, IndexError):  # there is none, or it has just gone
            pid = int(draw.choice(children))
            if Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
                os.kill(pid, signal.SIGKILL)
                num_done += 1
    return num_done


@pytest.mark.parametrize(
    ("num_kills", "spec", "pause", "may_isolate"),
    [
        (10, HOSTILE, 0.05, False),
        pytest.param(200, HOSTILE, 0.1, False, marks=pytest.mark.exhaustive),
        pytest.param(200, WAITING, 0.1, True, marks=pytest.mark.exhaustive),
        pytest.param(200, WAITING, 0.02, False, marks=pytest.mark.exhaustive),
    ],
)
def test_processes_killed_at_random_cost_no_bit(undisturbed, num_kills, spec, pause, may_isolate):
    """Episodes are played again and again until all kills are done."""
    with pool(spec, max_workers=4, timeout_seconds=60, may_isolate=may_isolate) as runner:
        stop, counts = threading.Event(), []

        def kill():
            counts.append(kill_at_random(runner, num_kills, stop, pause=pause, seed=num_kills))

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            num_games = 0
            while killer.is_alive() or num_games == 0:
                assert play(runner, 64) == undisturbed
                num_games += 1
        finally:
            stop.set()
            killer.join()
        assert counts == [num_kills]
        assert runner.num_kills >= num_kills // 2


def test_a_script_that_trains_when_it_is_imported_starts_no_processes_without_end(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(
        "from shardes.config.task import TaskConfig\n"
        "from shardes.environments.base import EnvironmentSpec\n"
        "from shardes.environments.pool import make_environment_runner\n"
        f"task = TaskConfig(data='range:0:1', environment={f'{file}:C'!r}, reward_isolation='none')\n"
        "make_environment_runner(task, EnvironmentSpec(task.environment), key='task')\n"
        "class C:\n"
        "    pass\n"
    )
    result = subprocess.run(
        [sys.executable, file], capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert result.returncode == 1
    assert (
        "it begins to train when it is imported; put that below: if __name__ == '__main__':" in result.stderr
    )
