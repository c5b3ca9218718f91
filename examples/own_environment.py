"""An environment of your own: two questions, and a reward at the end alone. About 30 seconds on a CPU.

python examples/own_environment.py [RUN_DIR]
"""

import sys

from shardes import TrainConfig, Trainer


class TwoQuestions:
    """Asks two questions, and likes answers that multiply; the model is told so only after the second."""

    def reset(self, a, b):
        """Begin an episode; a and b are columns of its row."""
        self.questions = [self.question(a, b), self.question(b, a)]
        self.num_products = 0
        return self.questions.pop(0)

    def step(self, completion):
        """Take in an answer; return what is said next, a reward, and whether that was all."""
        self.num_products += min(completion.count("*"), 2)
        if self.questions:
            return " " + self.questions.pop(0), 0.0, False
        return "", self.num_products / 4, True

    @staticmethod
    def question(a, b):
        """Return a question as the model knows them."""
        return f"{a} {b} {a + b % 7}={a * b}:"


if __name__ == "__main__":  # the processes that environments run in import this file, too
    config = TrainConfig(
        model={"path": "configs/quickstart/model", "dtype": "float32"},
        run={"dir": sys.argv[1] if len(sys.argv) > 1 else "runs/own-environment"},
        rollout={"max_new_tokens": 9, "micro_batch_size": 16},
        es={"iterations": 12, "population": 16, "sigma": 0.02, "alpha": 0.01},
        eval={"every": 4},
        task={"environment": f"{__file__}:TwoQuestions", "max_turns": 2},
    )
    problems = [{"a": a, "b": b} for a in range(1, 9) for b in range(1, 9)]
    trainer = Trainer(config, data=problems[::2], heldout_data=problems[1::2])
    for iteration, reward in trainer.train().heldout_rewards.items():
        print(f"after {iteration:2} updates: {reward:.2f}")
