"""Rewards of a task, as a configuration selects them."""

from collections.abc import Mapping

from shardes.config.schema import ProblemSetConfig
from shardes.errors import UserError
from shardes.rewards.signature import GIVEN
from shardes.tasks.base import Component, RewardFunction, TaskDefinition


def components(
    config: ProblemSetConfig,
    definition: TaskDefinition | None,
    *,
    known: Mapping[str, RewardFunction],
    key: str = "task",
) -> tuple[Component, ...]:
    """Return the rewards that a section configures, or else the built-in task's own.

    Nothing is imported: whether a function of the user's exists is seen where it runs.

    Args:
        config: The section.
        definition: The built-in task that it names, if it names one.
        known: Built-in rewards by name.
        key: The section's place, for messages.

    Raises:
        UserError: No such reward, two of one label, or rewards for a task that has none.
    """
    is_likelihood = definition is not None and definition.choices is not None
    if is_likelihood and config.rewards:
        raise UserError(
            f"{key}.rewards: {config.name} compares likelihoods and has no answers to reward; choose "
            f"{key}.metric instead"
        )
    if not is_likelihood and config.metric is not None:
        raise UserError(
            f"{key}.metric: got {config.metric}, which is for tasks that compare likelihoods; this one has "
            "answers, which its rewards judge"
        )
    if config.reward is not None:
        return (Component(label_of(config.reward), config.reward, takes_messages=True),)
    if not config.rewards:
        if config.is_episodic:
            return ()
        assert definition is not None, "the configuration has a built-in task or rewards"
        return definition.rewards
    found: dict[str, Component] = {}
    for i, reward in enumerate(config.rewards):
        if reward.name is not None and reward.name not in known:
            raise UserError(
                f"{key}.rewards.{i}.name: got {reward.name!r}; known rewards: {', '.join(sorted(known))}; "
                "a function of your own goes into path"
            )
        if taken := sorted(GIVEN & set(reward.arguments)):
            raise UserError(
                f"{key}.rewards.{i}.arguments: {taken[0]} is what every call is given; call the argument "
                "something else"
            )
        source = reward.path or known[str(reward.name)]
        label = reward.label or reward.name or label_of(str(reward.path))
        if label in found:
            raise UserError(f"{key}.rewards.{i}: two rewards are called {label!r}; give one another label")
        found[label] = Component(label, source, reward.weight, reward.arguments, isinstance(source, str))
    return tuple(found.values())


def label_of(reference: str) -> str:
    """Return the name of the function in ``package.module:function``."""
    return reference.rpartition(":")[2]
