"""Settings with which the models of a comparison answer."""

from dataclasses import dataclass

from shardes.config.schema import Config

GREEDY = {"temperature": 0.0, "top_k": None, "top_p": 1.0, "samples_per_prompt": 1}
"""Keys of the section ``rollout`` for greedy answers."""


@dataclass(frozen=True)
class Drawing:
    """Way in which several answers to each problem are drawn.

    Attributes:
        num_answers: Number of answers to each problem; 0: none are drawn.
        temperature: Divisor of the logits.
        seed: Key of the random numbers, the same for all models.
    """

    num_answers: int
    temperature: float
    seed: int

    def settings(self, config: Config, *, is_greedy: bool = False) -> Config:
        """Return the configuration with which answers are drawn, or greedy ones if none are."""
        drawn = {"temperature": self.temperature, "samples_per_prompt": self.num_answers}
        changes = GREEDY if is_greedy or not self.num_answers else drawn
        rollout = config.rollout.model_copy(update=changes)
        es = config.es.model_copy(update={"seed": self.seed})
        return config.model_copy(update={"rollout": rollout, "es": es})
