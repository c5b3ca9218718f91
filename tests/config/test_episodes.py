"""The keys of episodes: what goes together, and one message for what does not."""

import pytest

from shardes.config.loading import parse_config
from shardes.errors import UserError
from tests.helpers.config_trees import MINIMAL


def parsed(task, **sections):
    tree = {**MINIMAL, "task": {"data": "range:0:8", **task}}
    for section, keys in sections.items():
        tree[section] = {**tree.get(section, {}), **keys}
    return parse_config(tree, source="test")


@pytest.mark.parametrize(
    "task",
    [
        {"environment": "games.py:Game"},
        {"environment": "package.games:Game", "environment_arguments": {"size": 3}, "reward": "r.py:f"},
        {"environment": "reasoning_gym:chain_sum", "episode_return": "last", "max_turns": 1},
        {"tools": ["t.py:add", "t.py:mul"], "reward": "r.py:f"},
        {"environment": "t.py:Calculator", "rewards": [{"path": "r.py:f", "weight": 0.5}]},
        {"harness": "agent.py:run"},
        {"environment": "verifiers:gsm8k-v1"},
    ],
)
def test_episodes_are_taken(task):
    config = parsed(task)
    assert config.task.is_episodic
    assert str(config.task.data) == "range:0:8"


@pytest.mark.parametrize(
    ("task", "sections", "message"),
    [
        (
            {"environment": "Game"},
            {},
            "environment must be 'module:Class', 'file.py:Class' or 'adapter:name'",
        ),
        ({"harness": "run"}, {}, "harness must be 'module:function' or 'file.py:function'; got 'run'"),
        ({"tools": ["add"], "reward": "r:f"}, {}, "tools must be 'module:function' or 'file.py:function'"),
        ({"tools": ["t.py:add"]}, {}, "tools earn nothing by themselves; give a reward"),
        ({"harness": "a.py:f", "reward": "r.py:f"}, {}, "harness earns by itself; remove"),
        ({"harness": "a.py:f", "tools": ["t.py:g"]}, {}, "harness earns by itself; remove"),
        ({"harness": "a.py:f", "environment": "g.py:G"}, {}, "harness and environment both play"),
        ({"harness": "a.py:f", "system": "be"}, {}, "system is for prompts and environments"),
        ({"harness": "a.py:f", "episode_return": "last"}, {}, "episode_return is for rewards of turns"),
        ({"environment": "verifiers:x", "reward": "r.py:f"}, {}, "environment verifiers:x earns by itself"),
        ({"environment": "verifiers:x", "tools": ["t.py:g"]}, {}, "environment verifiers:x earns by itself"),
        ({"environment": "g.py:G", "name": "countdown"}, {}, "name is countdown, but environment"),
        ({"environment": "g.py:G", "metric": "accuracy"}, {}, "metric is accuracy, but environment"),
        ({"reward": "r.py:f", "max_turns": 3}, {}, "max_turns is for episodes of many turns"),
        ({"reward": "r.py:f", "episode_return": "last"}, {}, "episode_return is for episodes"),
        (
            {"reward": "r.py:f", "environment_arguments": {"a": 1}},
            {},
            "environment_arguments is for episodes",
        ),
        ({"reward": "r.py:f"}, {"rollout": {"max_context": 9}}, "rollout.max_context is for episodes"),
        ({"environment": "g.py:G", "max_turns": 0}, {}, "max_turns"),
        (
            {"environment": "g.py:G"},
            {"rollout": {"members_per_forward": 2}, "es": {"noise": "low_rank"}},
            "set rollout.members_per_forward: 1",
        ),
        ({"environment": "g.py:G"}, {"log": {"kl_every": 2}}, "set log.kl_every: 0"),
        ({}, {}, "or environment (episodes of many turns)"),
        ({"enviroment": "g.py:G"}, {}, "did you mean 'task.environment'"),
    ],
)
def test_what_does_not_go_together_is_refused(task, sections, message):
    with pytest.raises(UserError) as caught:
        parsed(task, **sections)
    assert message in str(caught.value)
