"""Cohorts of a task's episodes, by what runs them."""

from collections.abc import Collection, Mapping
from typing import cast

from shardes.environments.base import EnvironmentRunner, HarnessSpec
from shardes.rewards.scorer import Scorer
from shardes.rollout.conversation import Conversation
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.environment_cohort import EnvironmentCohort, PlayedEpisode
from shardes.rollout.turns import Cohort, EpisodeLimits
from shardes.tasks.base import Row


def begin_cohort(
    number: int,
    episodes: Mapping[int, Row],
    *,
    scorer: Scorer,
    encoder: PromptEncoder,
    limits: EpisodeLimits,
    model: str,
    end_ids: Collection[int],
) -> Cohort:
    """Begin episodes, and return at once.

    Args:
        number: Which cohort it is.
        episodes: Rows by index, in order.
        scorer: Of their task; it has what runs them.
        encoder: Makes tokens of conversations.
        limits: Limits of an episode.
        model: Name of the model that harnesses ask.
        end_ids: Tokens that end an answer.
    """
    settings, runner = scorer.task.episodes, scorer.environments
    assert settings is not None, "the task has episodes"
    assert runner is not None, "and what runs them"
    if isinstance(settings.program, HarnessSpec):
        # The endpoint's packages are there for harnesses alone.
        from shardes.environments.harness_runner import HarnessRunner
        from shardes.rollout.harness_cohort import HarnessCohort, RequestTexts

        assert isinstance(runner, HarnessRunner)
        return HarnessCohort(
            number,
            episodes,
            model=model,
            limits=limits,
            queue=runner.queue,
            texts=RequestTexts(encoder, scorer.task.chat),
            start=runner.start,
            num_at_once=runner.num_at_once,
        )
    handles = cast(EnvironmentRunner, runner).begin(list(episodes.values()))
    chat, tools, system = scorer.task.chat, runner.tools, settings.system
    played = {
        index: PlayedEpisode(
            handle,
            Conversation(encoder, chat, tools, as_chat=system is not None, end_ids=end_ids),
            system=system,
            tools=tools,
        )
        for index, handle in zip(episodes, handles, strict=True)
    }
    return EnvironmentCohort(number, played, encoder=encoder, limits=limits)
