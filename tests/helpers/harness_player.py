"""Harnesses played with a function that answers, in place of a player with an engine."""

from collections import deque

from shardes.environments.harness_runner import HarnessRunner
from shardes.rollout.harness_cohort import HarnessCohort, RequestTexts
from shardes.tasks.loading import program_of


class HarnessPlayer(HarnessRunner):
    """A runner that makes cohorts, too."""

    def __init__(self, config, *, sampling, encoder, chat):
        super().__init__(program_of(config), config, sampling=sampling, key="task.harness")
        self.texts = RequestTexts(encoder, chat)

    def begin(self, number, episodes, *, model, limits):
        return HarnessCohort(
            number,
            episodes,
            model=model,
            limits=limits,
            queue=self.queue,
            texts=self.texts,
            start=self.start,
            num_at_once=self.num_at_once,
        )


def play(player, cohorts, answer, *, model, limits, take, num_lanes=2):
    """Plays cohorts to their end, some of them in turn."""
    waiting = deque(cohorts.items())
    lanes = deque()
    try:
        while waiting or lanes:
            while waiting and len(lanes) < num_lanes:
                number, episodes = waiting.popleft()
                lanes.append(player.begin(number, episodes, model=model, limits=limits))
            cohort = lanes[0]
            prompts = cohort.advance()
            for index, outcome in cohort.outcomes().items():
                take(index, outcome)
            if prompts:
                cohort.answer(answer(prompts, cohort=cohort.number))
                lanes.rotate(-1)
            else:
                lanes.popleft()
    finally:
        for cohort in lanes:
            cohort.close()
