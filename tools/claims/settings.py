"""Options of GRPO."""

from dataclasses import dataclass

from shardes.errors import UserError


@dataclass(frozen=True)
class GRPOSettings:
    """Options of GRPO that a configuration of shardes does not have.

    Attributes:
        learning_rate: Step size of AdamW.
        num_generations: Answers to a prompt that are compared with each other.
        prompts_per_step: Prompts of an update.
        beta: Weight of the divergence from the base model in the loss.
        micro_batch_size: Answers of a backward pass.
        bfloat16: Whether forward and backward passes are computed in bfloat16; weights stay in float32.
        bundle: Number of prompts whose answers are judged together: each gets the mean of their rewards.
    """

    learning_rate: float
    num_generations: int = 8
    prompts_per_step: int = 16
    beta: float = 0.0
    micro_batch_size: int = 128
    bfloat16: bool = False
    bundle: int = 1

    @property
    def completions_per_step(self) -> int:
        """Return the number of answers of an update."""
        return self.num_generations * self.prompts_per_step

    def check(self, num_rows: int, *, num_completions: int) -> None:
        """Refuse settings that do not go with each other or with the data.

        Args:
            num_rows: Number of training rows.
            num_completions: Number of answers that may be generated.

        Raises:
            UserError: They do not.
        """
        if self.prompts_per_step > num_rows:
            raise UserError(
                f"--prompts-per-step: got {self.prompts_per_step}, but there are {num_rows} training rows; "
                "give at most as many"
            )
        if self.prompts_per_step % self.bundle:
            raise UserError(
                f"--bundle: got {self.bundle}, which does not divide --prompts-per-step "
                f"{self.prompts_per_step}; give a number that does"
            )
        if num_completions < self.completions_per_step:
            raise UserError(
                f"--completions: got {num_completions}, but an update alone takes "
                f"{self.completions_per_step}; give more"
            )

    @property
    def backward_size(self) -> int:
        """Return the answers of a backward pass: the most that divide those of an update."""
        most = min(self.micro_batch_size, self.completions_per_step)
        return next(size for size in range(most, 0, -1) if self.completions_per_step % size == 0)
