"""Write golden_updates.json: updates of a few weights by the oracle, for every optimizer."""

import json
import random
from pathlib import Path

from tests.helpers.update_oracle import Weight

GOLDEN = Path(__file__).with_name("golden_updates.json")
CASES = {
    "sgd": {},
    "sgd, decay": {"weight_decay": 0.3},
    "momentum": {"optimizer": "momentum", "momentum": 0.7},
    "momentum, decay to the base": {"optimizer": "momentum", "weight_decay": 0.05, "towards_base": True},
    "adam": {"optimizer": "adam"},
    "adam, other moments": {"optimizer": "adam", "betas": [0.8, 0.95], "epsilon": 1e-3},
    "adam, decay to the base": {"optimizer": "adam", "weight_decay": 0.1, "towards_base": True},
}
ITERATIONS = [0, 1, 2, 999, 123456]  # the last ones for the powers
GRADIENTS = [0x00000000, 0x80000000, 0x00000001, 0x007FFFFF, 0x3F800000, 0xDE800000, 0x1E8DABC6]


def some_number(draw, *, least=-30, largest=4):
    """Return the bits of a float32 number of a random magnitude."""
    return draw.getrandbits(1) << 31 | draw.randint(127 + least, 127 + largest) << 23 | draw.getrandbits(23)


def follow(case, weights, gradients, *, alphas):
    """Apply all iterations to all weights; returns the bits of the master after each."""
    case = dict(case)
    to_base = case.pop("towards_base", False)
    followed = [Weight(bits, base=bits if to_base else None, **case) for bits in weights]
    rows = []
    for t, row, alpha in zip(ITERATIONS, gradients, alphas, strict=True):
        for weight, gradient in zip(followed, row, strict=True):
            weight.update(gradient, t=t, alpha=alpha)
        rows.append([weight.master for weight in followed])
    return rows


def make():
    draw = random.Random(1)
    weights = [some_number(draw, largest=0) for _ in range(16)]
    gradients = [
        [draw.choice(GRADIENTS) if draw.random() < 0.2 else some_number(draw) for _ in weights]
        for _ in ITERATIONS
    ]
    alphas = [0.01, 0.007, 1e-3, 0.3, 5e-5]
    golden = {"weights": weights, "gradients": gradients, "alphas": alphas, "masters": {}}
    for name, case in CASES.items():
        golden["masters"][name] = follow(case, weights, gradients, alphas=alphas)
    return golden


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(make()) + "\n")
