"""Rewards in processes of their own: what they do there harms nobody else."""

import contextlib
import json
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardes.config.schema import TaskConfig
from shardes.errors import UserError
from shardes.rewards import crew, isolation, output
from shardes.rewards.batch import RewardBatch
from shardes.rewards.fork_server import HEADER
from shardes.rewards.pool import InProcessRewards, RewardProcessPool, make_reward_runner
from shardes.rewards.processes import ForkServer
from shardes.tasks.base import Component, Task
from tests.helpers import hostile_rewards
from tests.helpers.ranks import ROOT

OBEY = Component("obey", hostile_rewards.obey)
LATER = Component("later", hostile_rewards.obey_later)
LENGTH = Component("length", "tests/helpers/hostile_rewards.py:length")
PID = Component("pid", hostile_rewards.pid)
SURROUNDINGS = Component("surroundings", hostile_rewards.surroundings)
PROCESSES = Component("processes", hostile_rewards.processes)
NUMBER = Component("number", hostile_rewards.number)
COLUMNS = Component("columns", hostile_rewards.num_columns)
MEET = Component("meet", hostile_rewards.meet)
LIMIT = 2.0


def answers(*completions):
    return RewardBatch.of(
        [{}] * len(completions), ["p"] * len(completions), completions, [[]] * len(completions)
    )


def sandbox(*components, timeout_seconds=LIMIT, max_workers=16, memory_bytes=None, may_isolate=False):
    return RewardProcessPool(
        components or [OBEY],
        timeout_seconds=timeout_seconds,
        max_workers=max_workers,
        memory_bytes=memory_bytes,
        may_isolate=may_isolate,
    )


def judged(rewards, *completions, component=OBEY):
    (future,) = rewards.submit([component], [answers(*completions)])
    output = future.result(60)
    values = output.components[component.name]
    assert [value is None for value in values] == output.has_failed
    return values, output.first_failure


def forged(values, has_failed=(False,), first_failure=None):
    """Return the command that has a worker reply this for one answer."""
    parts = {"components": {"obey": values}, "has_failed": has_failed, "first_failure": first_failure}
    return "forge:" + json.dumps(parts | {"id": "ID"}).replace('"ID"', "ID")


@pytest.fixture(scope="module")
def rewards():
    with sandbox(OBEY, LATER, LENGTH, PID, memory_bytes=2**30) as rewards:
        yield rewards


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_numbers_are_those_of_this_process(rewards):
    batches = [answers(*("x" * (i % 7) for i in range(n))) for n in (1, 5, 32, 1)]
    wanted = InProcessRewards([LENGTH, OBEY, LATER]).submit([LENGTH, LATER], batches)
    found = rewards.submit([LENGTH, LATER], batches)
    assert [future.result(60) for future in found] == [future.result() for future in wanted]
    assert rewards.submit([LENGTH], []) == []


def test_a_reward_runs_in_another_process_which_is_kept(rewards):
    (first,), _ = judged(rewards, "a", component=PID)
    assert first != os.getpid()
    assert judged(rewards, "a", component=PID)[0] == [first]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("exit:3", "the reward ended its process (exit status 3)"),
        ("exit:0", "the reward ended its process (exit status 0)"),
        ("crash", "the reward ended its process (signal 11)"),
        ("fill:4000000000", "MemoryError"),
        ("raise:no such key", "LookupError: no such key"),
        ('forge:{"id": ID}', "the reward broke its process (KeyError: 'components')"),
        ("forge:{}", "the reward broke its process (ValueError: a reply to nothing that was asked)"),
        ("forge:[]", "the reward broke its process (ValueError: a reply to nothing that was asked)"),
        ('forge:{"id": 1000000}', "the reward broke its process (ValueError: a reply to nothing that was a"),
        ("forge:not json", "the reward broke its process (JSONDecodeError"),
        (forged([]), "the reward broke its process (ValueError: a reply of the wrong size)"),
        (
            forged([1.0], [False, False]),
            "the reward broke its process (ValueError: a reply of the wrong size)",
        ),
        (forged(["1"]), "the reward broke its process (ValueError: a reply that is not made of numbers)"),
        (forged([float("nan")]), "the reward broke its process (ValueError: a reply that is not made of"),
        (forged([1e100]), "the reward broke its process (ValueError: a reply that is not made of numbers)"),
        (forged([1.0], first_failure=[1]), "the reward broke its process (TypeError: a reply whose message"),
    ],
)
def test_an_answer_that_breaks_its_process_fails_alone(rewards, command, words):
    assert judged(rewards, "a", command, "bcd")[0] == [1.0, None, 3.0]
    values, first = judged(rewards, command)
    assert values == [None]
    assert words in first
    assert judged(rewards, "ab")[0] == [2.0]


@pytest.mark.parametrize("command", ["hang", "deafen", "half a message"])
def test_an_answer_that_hangs_fails_alone_and_its_process_is_replaced(rewards, command):
    values, first = judged(rewards, "a", command, "bcd")
    assert values == [1.0, None, 3.0]
    assert first.startswith("TimeoutError: the reward did not end within 2 s (task.reward_timeout_seconds)")
    assert judged(rewards, "a", command, "bcd", component=LATER)[0] == [1.0, None, 3.0]
    assert judged(rewards, "ab")[0] == [2.0]


@pytest.fixture(scope="module", params=["auto", "none"])
def one_worker(request):
    """Rewards in one process at a time, so that every call follows the one before in it, or replaces it."""
    config = TaskConfig(
        data="d", reward="m:f", reward_workers=1, reward_timeout_seconds=20, reward_isolation=request.param
    )
    task = Task("t", [{}], [], lambda row: "p", (OBEY, LATER, SURROUNDINGS))
    with make_reward_runner(config, [task]) as rewards:
        yield rewards


@pytest.mark.parametrize("component", [OBEY, LATER])
def test_a_child_never_answers(one_worker, component):
    commands = ["fork:exit", "fork:return", "fork:raise", "fork:linger", "abc"]
    wanted = [3.0, 0.0, 1.0, 6.0, 3.0]
    for _ in range(2):
        assert judged(one_worker, *commands, component=component) == (wanted, None)
    for length in range(1, 20):  # the last child may still live, and what it says must not be taken for ours
        assert judged(one_worker, "x" * length, component=component) == ([float(length)], None)


LEAVINGS = ["alarm", "alarm by a number", "raising alarm", "pending", "handlers", "surroundings"]
LEAVINGS += ["guard", "files", "streams", "no stream"]
if os.geteuid() == 0:
    LEAVINGS.append("user")
WITH_PROCESSES = ["thread", "process=PATH", "daemon=PATH"]


@pytest.mark.parametrize(
    ("one_worker", "what"),
    [("auto", what) for what in LEAVINGS + WITH_PROCESSES] + [("none", what) for what in WITH_PROCESSES],
    indirect=["one_worker"],
)
def test_what_a_call_leaves_behind_does_not_reach_the_next(one_worker, what, tmp_path):
    path = tmp_path / "pid"
    before = judged(one_worker, "a", component=SURROUNDINGS)
    command = "leave:" + what.replace("PATH", str(path))
    assert judged(one_worker, command) == ([float(len(command))], None)
    assert judged(one_worker, "sleep:0.1", "b") == ([9.0, 1.0], None)
    assert judged(one_worker, command) == ([float(len(command))], None)
    assert judged(one_worker, "a", component=SURROUNDINGS) == before
    # Nor the next reward of the same answers.
    (future,) = one_worker.submit([OBEY, SURROUNDINGS], [answers(command)])
    if what not in ("thread", "user", "files", "streams", "no stream"):
        assert future.result(60).components["surroundings"] == before[0]
    wait_until(lambda: not is_open(path))


def test_a_process_whose_memory_is_full_is_replaced(rewards):
    assert judged(rewards, "leave:memory")[0] == [None]
    assert judged(rewards, "fill:700000000") == ([700000000.0], None)


def is_open(path):
    """Return True if a process has a file open."""
    with contextlib.suppress(OSError):
        for link in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):
                if link.readlink() == path:
                    return True
    return False


def test_a_worker_that_ended_unasked_costs_no_answer(one_worker):
    assert judged(one_worker, "ab")[0] == [2.0]
    for worker in one_worker._crew._idle:
        os.kill(worker.pid, signal.SIGKILL)
        wait_until(worker.reader.at_eof)
    assert judged(one_worker, "abc") == ([3.0], None)


def test_a_worker_sees_its_own_processes_alone_or_the_log_says_why_not(caplog):
    caplog.set_level(logging.INFO)
    with sandbox(PROCESSES, OBEY, may_isolate=True, timeout_seconds=1) as rewards:
        (num_seen,), _ = judged(rewards, "a", component=PROCESSES)
        if isolation.why_not_isolated() is not None:
            assert "which see those of this machine (" in caplog.text
            pytest.skip("the kernel does not allow it")
        assert "which see no others" in caplog.text
        assert num_seen == 2  # the one that waits for the worker, and the worker
        assert judged(rewards, "kill template", "ab")[0] == [None, 2.0]  # it lives on
        assert judged(rewards, "crash", "exit:9")[1] == "the reward ended its process (signal 11)"
        assert judged(rewards, "exit:9")[1] == "the reward ended its process (exit status 9)"
    with sandbox(PROCESSES) as rewards:
        assert judged(rewards, "a", component=PROCESSES)[0][0] > 2


@pytest.mark.parametrize(
    ("refused", "words"), [("unshare", "unshare: not here"), ("mount", "/proc: not here")]
)
def test_a_kernel_that_does_not_allow_it_is_quoted(monkeypatch, refused, words):
    def call(name, *arguments):
        if name == refused:
            raise OSError(1, "not here")

    monkeypatch.setattr(isolation, "_call", call)
    monkeypatch.setattr(isolation, "_has_capabilities", lambda: True)
    assert isolation.why_not_isolated() == words


AS_NOBODY = """
import ctypes, os, sys
from pathlib import Path
from shardes.rewards.isolation import run_isolated, why_not_isolated
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, as it is after a login
if (obstacle := why_not_isolated()) is not None:
    print(obstacle)
    sys.exit(7)
def work():
    rights = Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0]
    print(os.getuid(), os.getgid(), os.getpid(), rights, flush=True)
    os._exit(3)
run_isolated(work, close=lambda: None)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_user_without_rights_is_isolated_and_gets_none():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", AS_NOBODY]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    if result.returncode == 7:
        pytest.skip(result.stdout)
    assert (result.returncode, result.stdout) == (3, "65534 65534 2 0000000000000000\n"), result.stderr


@pytest.mark.parametrize("may_isolate", [True, False])
def test_a_killed_reward_leaves_no_semaphores(may_isolate, tmp_path):
    path = tmp_path / "made"
    with sandbox(may_isolate=may_isolate, timeout_seconds=60) as rewards:
        (future,) = rewards.submit([OBEY], [answers(f"semaphores:{path}")])
        wait_until(path.exists)
        left = [Path("/dev/shm") / name for name in path.read_text().split()]
        assert [each.name.split("_")[0].split("-")[0] for each in left] == ["sem.mp", "psm"]
        assert all(each.exists() for each in left)
        future.cancel()
    assert not any(each.exists() for each in left)


def test_what_rewards_print_is_cut(capfd):
    with sandbox(timeout_seconds=60) as rewards:
        assert judged(rewards, "print:first\n", "flood:30000000", "print:last\n")[1] is None
    printed = capfd.readouterr().err
    assert printed.startswith("first\nxxx")
    assert 60_000 < len(printed) < 70_000
    assert "\n[rewards printed more than 65536 bytes at once; what follows is cut]\n" in printed
    cut = int(re.search(r"\[(\d+) bytes that rewards printed were cut\]\n$", printed)[1])
    assert cut + printed.count("x" * 63 + "\n") * 64 == (30_000_000 >> 16 << 16) + len("last\n")


def test_a_log_goes_on_after_a_cut(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    with (tmp_path / "log").open("wb") as file:
        log = output.LimitedLog(file.fileno(), max_bytes=100, bytes_per_second=10)
        log.write(b"a" * 60 + b"\n")
        log.write(b"b" * 30 + b"\n" + b"c" * 30)  # the line that is cut is left out as a whole
        log.write(b"d" * 10)
        now = 4.0
        log.write(b"e" * 10)
        now = 60.0
        log.write(b"f" * 10)
        log.close()
    lines = (tmp_path / "log").read_text().splitlines()
    cut = ["", "[rewards printed more than 100 bytes at once; what follows is cut]"]
    assert lines == ["a" * 60, "b" * 30, *cut, "[50 bytes that rewards printed were cut]", "f" * 10]


REWARD_FILE = """
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
import neighbour

def spawned(completions, **kwargs):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(double, completions))

def forked(completions, **kwargs):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return list(pool.map(double, completions))

def double(text):
    return float(neighbour.double(len(text)))
"""


def test_rewards_of_a_file_use_their_neighbours_and_processes_of_their_own(tmp_path):
    (tmp_path / "neighbour.py").write_text("def double(n):\n    return 2 * n\n")
    (tmp_path / "in_a_pool.py").write_text(REWARD_FILE)
    parts = [Component(name, f"{tmp_path}/in_a_pool.py:{name}") for name in ("spawned", "forked")]
    with sandbox(*parts, may_isolate=True, timeout_seconds=60) as rewards:
        workers = list(rewards._crew._idle)
        (future,) = rewards.submit(parts, [answers("a", "bc")])
        output = future.result(60)
        assert output.components == {"spawned": [2.0, 4.0], "forked": [2.0, 4.0]}, output.first_failure
        assert rewards._crew._idle == workers  # nothing was left behind


class Picture:
    """A large object, which must not be sent to another process."""

    def __reduce__(self):
        raise TypeError("it was sent")


def test_what_an_import_leaves_behind_does_not_reach_the_first_call(tmp_path, capfd):
    (tmp_path / "my.rewards.py").write_text(
        "import os, signal, time\n"
        "from multiprocessing import get_context\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.2)\n"
        "os.fork()\n"
        "def double(text):\n"
        "    return 2 * float(text)\n"
        "def reward(completions):\n"
        "    time.sleep(0.3)\n"
        "    with get_context('fork').Pool(1) as pool:\n"
        "        return pool.map(double, completions)\n"
    )
    component = Component("r", f"{tmp_path / 'my.rewards.py'}:reward")
    with sandbox(component) as rewards:
        assert judged(rewards, "1", "2", component=component) == ([2.0, 4.0], None)
    assert "Traceback" not in capfd.readouterr().err


def test_columns_that_no_reward_looks_at_are_not_sent():
    rows = [{"picture": Picture(), "n": 3}, {"picture": Picture(), "n": 4}]
    batch = RewardBatch.of(rows, ["p", "p"], ["a", "b"], [[], []])
    with sandbox(NUMBER, LENGTH) as rewards:
        (future,) = rewards.submit([NUMBER, LENGTH], [batch])
        assert future.result(60).components == {"number": [3.0, 4.0], "length": [1.0, 1.0]}
        assert batch.columns["picture"][0] is rows[0]["picture"]
    with sandbox(NUMBER, COLUMNS) as rewards:
        (future,) = rewards.submit([NUMBER, COLUMNS], [batch])
        assert "it was sent" in future.result(60).first_failure
        (future,) = rewards.submit([COLUMNS], [RewardBatch.of([{"n": 1, "m": 2}], ["p"], ["a"], [[]])])
        assert future.result(60).components == {"columns": [2.0]}


def test_many_that_hang_do_so_at_the_same_time(rewards):
    start = time.monotonic()
    batches = [answers("hang", *("x" * n for n in range(1, 5))) for _ in range(8)]
    futures = rewards.submit([OBEY], [answers(*["hang"] * 8, "abc"), *batches])
    values = [future.result(120).components["obey"] for future in futures]
    assert values == [[None] * 8 + [3.0]] + [[None, 1.0, 2.0, 3.0, 4.0]] * 8
    # 16 of them, one after the other, would take 16 times the limit at least.
    assert time.monotonic() - start < 10 * LIMIT


def test_one_process_is_enough_however_many_hang():
    with sandbox(max_workers=1, timeout_seconds=0.5) as rewards:
        assert judged(rewards, "hang", "a", "hang", "bc")[0] == [None, 1.0, None, 2.0]


def test_a_call_may_take_its_whole_limit(rewards):
    start = time.monotonic()
    assert judged(rewards, f"sleep:{LIMIT * 0.75}", "a")[0] == [len("sleep:1.5"), 1.0]
    assert time.monotonic() - start >= LIMIT * 0.75


def test_processes_grow_in_number_while_answers_wait(monkeypatch):
    monkeypatch.setattr(crew, "PATIENCE_SECONDS", 0.01)
    with sandbox(OBEY, PID, timeout_seconds=30, max_workers=3) as rewards:
        slow = rewards.submit([OBEY, PID], [answers("sleep:0.5")] * 6)
        pids = {future.result(60).components["pid"][0] for future in slow}
    assert len(pids) == 3
    assert not any(is_alive(int(pid)) for pid in pids)


def test_what_a_reward_started_ends_with_it(rewards, tmp_path):
    path = tmp_path / "pid"
    assert judged(rewards, f"child:{path}")[0] == [None]
    wait_until(lambda: not is_alive(int(path.read_text())))


def test_killing_the_template_costs_no_innocent_answer(rewards):
    assert judged(rewards, "a", "kill template")[0] == [1.0, None]
    assert judged(rewards, "abc", "d")[0] == [3.0, 1.0]


def test_when_the_template_dies_so_do_its_workers_and_others_take_over():
    with sandbox(OBEY, PID, timeout_seconds=60) as rewards:
        (first,), _ = judged(rewards, "a", component=PID)
        os.kill(rewards._crew._fork_server._process.pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(int(first)))
        (second,), _ = judged(rewards, "a", component=PID)
        assert second is not None  # it is not this call's fault
        assert second != first
        assert judged(rewards, "ab", "c")[0] == [2.0, 1.0]


def test_after_half_of_the_limit_answers_are_judged_alone_and_the_call_goes_on(tmp_path):
    with sandbox(MEET, timeout_seconds=8) as rewards:
        path = str(tmp_path / "met")
        assert judged(rewards, path, path, path, component=MEET)[0] == [3.0, 3.0, 3.0]


def test_what_a_reward_prints_goes_to_standard_error(capfd):
    with sandbox() as rewards:
        judged(rewards, "print:hello from afar")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "hello from afar" in captured.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("f = 3", "has no function 'f'"),
        ("import no_such_module_anywhere", "ModuleNotFoundError"),
        ("import os; os._exit(4)", "importing it ended the process (exit status 4)"),
        (
            "import os, time; os.kill(os.getppid(), 9); time.sleep(1000)",
            "importing it ended the process (with its parent)",
        ),
        ("import time; time.sleep(1000)", "importing it took longer than 0.5 s"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_a_reward_that_cannot_be_imported_is_refused(tmp_path, monkeypatch, text, words):
    monkeypatch.setattr(crew, "IMPORT_SECONDS", 0.5)
    path = tmp_path / "reward.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        sandbox(Component("f", f"{path}:f"))
    assert str(caught.value).startswith("task.reward: ")
    assert words in str(caught.value)


def test_a_reward_that_can_no_longer_be_imported_keeps_nobody_waiting(tmp_path):
    path = tmp_path / "reward.py"
    reward = Component("f", f"{path}:f")
    path.write_text("import os\n\n\ndef f(completions):\n    os._exit(3)\n")
    with sandbox(reward, max_workers=2) as rewards:
        path.write_text("raise RuntimeError('half written')\n")
        first, *others = rewards.submit([reward], [answers("a")] * 3)
        assert first.result(20).first_failure == "the reward ended its process (exit status 3)"
        for future in others + rewards.submit([reward], [answers("a")]):
            with pytest.raises(RuntimeError, match=r"no process for rewards can be started.*half written"):
                future.result(20)
        path.write_text("def f(completions):\n    return [7.0]\n")
        assert judged(rewards, "a", component=reward)[0] == [7.0]


def test_a_reward_whose_import_comes_to_kill_the_template_keeps_nobody_waiting(tmp_path):
    path = tmp_path / "reward.py"
    reward = Component("f", f"{path}:f")
    path.write_text("import os\n\n\ndef f(completions):\n    os._exit(3)\n")
    with sandbox(reward, max_workers=1) as rewards:
        assert "exit status 3" in judged(rewards, "a", component=reward)[1]
        path.write_text("import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(1000)\n")
        for future in rewards.submit([reward], [answers("a")] * 3):
            with pytest.raises(RuntimeError, match=r"no process for rewards can be started.*with its parent"):
                future.result(40)
        path.write_text("def f(completions):\n    return [7.0]\n")
        assert judged(rewards, "a", component=reward)[0] == [7.0]


def test_the_configuration_chooses_where_rewards_run():
    task = Task("t", [{}], [], lambda row: "p", (LENGTH,))
    config = {"data": "d", "reward": "m:f"}
    for workers, kind in ((0, InProcessRewards), (2, RewardProcessPool)):
        with make_reward_runner(TaskConfig(**config, reward_workers=workers), [task, task]) as rewards:
            assert type(rewards) is kind
            assert judged(rewards, "abc", component=LENGTH)[0] == [3.0]
    with make_reward_runner(TaskConfig(**config), [Task("t", [{}], [], lambda row: "p")]) as rewards:
        assert type(rewards) is InProcessRewards  # nothing to judge, no process


PARENT = """
import sys, time
from shardes.rewards.pool import RewardProcessPool
from shardes.rewards.batch import RewardBatch
from shardes.tasks.base import Component
from tests.helpers import hostile_rewards
parts = [Component("pid", hostile_rewards.pid), Component("obey", hostile_rewards.obey)]
rewards = RewardProcessPool(parts, timeout_seconds=1000, max_workers=3, memory_bytes=None)
one = lambda text: [RewardBatch.of([{}], ["p"], [text], [[]])]
(future,) = rewards.submit(parts[:1], one("a"))
print(int(future.result().components["pid"][0]), rewards._crew._fork_server._process.pid)
sys.stdout.flush()
rewards.submit(parts[1:], one("hang"))
time.sleep(1000)
"""


def test_processes_end_with_the_one_that_started_them():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=environment)
    with process:
        pids = list(map(int, process.stdout.readline().split()))
        assert len(pids) == 2
        assert all(map(is_alive, pids))
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, pids)))


SIGNALLED_AS_IT_ENDS = """
import atexit, os, signal, sys
from shardes.rewards.fork_server import main
atexit.register(os.kill, os.getpid(), signal.SIGTERM)
main(int(sys.argv[1]), 0, os.getppid())
"""


def test_a_process_whose_reply_nobody_reads_ends_in_silence():
    with contextlib.closing(ForkServer(None)) as template:
        pid, connection = template.fork()
        setup = pickle.dumps((1, []))
        connection.sendall(HEADER.pack(len(setup)) + setup)
        connection.recv(1, socket.MSG_PEEK)
        connection.close()  # what is left unread is reported to the other end, as an error
        wait_until(lambda: not is_alive(pid))
        assert template.kill(pid) == 0


def test_a_template_told_twice_to_end_says_nothing():
    """A parent that dies closes the socket first; the signal for its death comes a moment later."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.shutdown(socket.SHUT_WR)
        result = subprocess.run(
            [sys.executable, "-c", SIGNALLED_AS_IT_ENDS, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            env=environment,
            timeout=60,
        )
    assert (result.returncode, result.stderr) == (0, "")


def test_a_template_whose_reply_nobody_reads_ends_in_silence():
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    code = f"from shardes.rewards.fork_server import main; main({theirs.fileno()}, 0, {os.getpid()})"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, env=environment)
    with process, control, theirs:
        control.send(b"k0")
        control.recv(1, socket.MSG_PEEK)
        theirs.close()
        control.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_nothing_heavy_is_imported_by_the_processes():
    heavy = "{'torch', 'numpy', 'pydantic'}"
    code = f"import sys, shardes.rewards.fork_server; print(sorted({heavy} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert output.stdout == "[]\n"
