"""Adapters where they are used: in worker processes, which are told what they need by a name alone."""

import pytest

from shardes.environments.base import EnvironmentSpec
from shardes.environments.pool import EnvironmentPool
from shardes.environments.starting import NoProcessError


def _pool(reference: str, **arguments: object) -> EnvironmentPool:
    return EnvironmentPool(
        EnvironmentSpec(reference, arguments), timeout_seconds=60, max_workers=1, memory_bytes=None
    )


def test_sets_of_strings_have_one_order_in_all_pools(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    (tmp_path / "words.py").write_text(
        "class Words:\n"
        "    def reset(self, index):\n"
        "        return ' '.join({str(n) for n in range(50)})\n"
        "    def step(self, completion):\n"
        "        return '', 0, True\n"
    )
    said = []
    for _ in range(2):
        with _pool(f"{tmp_path / 'words.py'}:Words") as pool:
            said.append(pool.begin([{"index": 0}])[0].wait().observation)
    assert len(said[0].split()) == 50 and said[0] == said[1]


@pytest.mark.parametrize(
    ("reference", "arguments", "completion"),
    [
        ("reasoning_gym:ransom_note", {"answer": "last_line"}, "True"),
        ("textarena:GuessTheNumber", {"max_number": 9}, "[5]"),
        ("gymnasium:FrozenLake-v1", {"is_slippery": False}, "2"),
    ],
)
def test_an_adapter_plays_in_a_worker(reference, arguments, completion) -> None:
    pytest.importorskip(reference.partition(":")[0])
    results = []
    for order in ([0, 1, 2], [2, 1, 0]):
        with _pool(reference, **arguments) as pool:
            episodes = pool.begin([{"index": index, "else": "x"} for index in order])
            begun = [episode.wait() for episode in episodes]
            for episode in episodes:
                episode.step(completion)
            stepped = [episode.wait() for episode in episodes]
            missing = pool.begin([{"number": 0}])[0].wait()
        assert [result.failure for result in begun + stepped] == [None] * 6
        assert "index" in missing.failure
        played = [
            (a.observation, b.observation, b.reward, b.is_done, b.numbers)
            for a, b in zip(begun, stepped, strict=True)
        ]
        results.append([played[order.index(index)] for index in range(3)])
    assert results[0] == results[1]
    assert results[0][0][0]


def test_what_is_wrong_with_a_name_is_told_when_the_pool_starts() -> None:
    pytest.importorskip("gymnasium")
    with pytest.raises(NoProcessError, match=r"^Unknown environment of gymnasium: 'Taxi'; nearest: Taxi-v"):
        _pool("gymnasium:Taxi")
