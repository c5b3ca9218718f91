"""docs/updates.md, step by step in whole numbers: what an update makes of the bits of one weight."""

from dataclasses import dataclass

from tests.helpers.exact_float32 import SIGN, add, bits_of, divide, multiply, square_root, subtract


def power(base, exponent):
    """Return a power as docs/updates.md has it."""
    product = 1.0
    for bit in bin(exponent)[2:]:
        product = product * product
        if bit == "1":
            product = product * base
    return product


@dataclass
class Weight:
    """One weight in a float32 master, and its optimizer's states."""

    master: int
    optimizer: str = "sgd"
    momentum: float = 0.9
    betas: tuple = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    base: int | None = None  # what it decays to; None: 0
    first: int = 0
    second: int = 0

    def update(self, gradient, *, t, alpha):
        """Apply the update of iteration ``t``; returns the step that is added, decay included."""
        step = self._step(gradient, t=t, alpha=alpha)
        if self.weight_decay:
            distance = self.master if self.base is None else subtract(self.master, self.base)
            step = subtract(step, multiply(distance, bits_of(alpha * self.weight_decay)))
        self.master = add(self.master, step)
        return step

    def _step(self, gradient, *, t, alpha):
        if self.optimizer == "sgd":
            return gradient
        if self.optimizer == "momentum":
            self.first = add(multiply(self.first, bits_of(self.momentum)), gradient)
            return self.first
        b1, b2 = self.betas
        square = multiply(gradient, gradient)
        self.first = add(multiply(self.first, bits_of(b1)), multiply(gradient, bits_of(1 - b1)))
        self.second = add(multiply(self.second, bits_of(b2)), multiply(square, bits_of(1 - b2)))
        corrected = multiply(self.second, bits_of(1 / (1 - power(b2, t + 1))))
        assert not corrected & SIGN
        self.root = add(square_root(corrected), bits_of(self.epsilon))
        mean = multiply(self.first, bits_of(1 / (1 - power(b1, t + 1))))
        return multiply(divide(mean, self.root), bits_of(alpha))
