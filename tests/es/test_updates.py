"""docs/updates.md: the steps in every bit, and the operations of torch that they are made of."""

import json
import re
from typing import get_args

import numpy as np
import pytest
import torch

from shardes.config.schema import EsConfig
from shardes.errors import UserError
from shardes.es import arithmetic
from shardes.es.optimizers import Adam, AdamVersion1, Decay, Momentum
from shardes.es.strategy import optimizer_of
from shardes.es.update import Update
from shardes.session import open_session
from tests.es.make_golden_updates import CASES, GOLDEN, ITERATIONS, make
from tests.helpers import exact_float32 as exact
from tests.helpers.exact_only import ExactOnly, InexactOperationError
from tests.helpers.models import make_config, tiny_model
from tests.helpers.noise_oracle import accumulated
from tests.helpers.ranks import ROOT
from tests.helpers.update_oracle import Weight, power

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])
on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])


def as_tensor(bits, device="cpu"):
    return torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32).copy()).to(device)


def as_bits(tensor):
    return tensor.cpu().contiguous().view(torch.int32).numpy().view(np.uint32).tolist()


# The whole step.


def settings_of(case):
    keys = {"optimizer": "sgd", **case}
    renamed = {"betas": "adam_betas", "epsilon": "adam_epsilon", "towards_base": "decay_towards"}
    keys = {renamed.get(key, key): value for key, value in keys.items()}
    if "decay_towards" in keys:
        keys["decay_towards"] = "base"
    return EsConfig(iterations=1, **keys)


def apply_all(case, golden, device):
    """Apply the golden file's gradients by the package; returns the bits of the masters after each."""
    settings = settings_of(case)
    optimizer = optimizer_of(settings)
    decay = Decay(settings.weight_decay, is_anchored=settings.decay_towards == "base")
    master = as_tensor(golden["weights"], device)
    base, rows = master.clone(), []
    states = [torch.zeros_like(master) for _ in optimizer.state_names]
    for t, gradient, alpha in zip(ITERATIONS, golden["gradients"], golden["alphas"], strict=True):
        step = optimizer.step(as_tensor(gradient, device), states, alpha=alpha, number=t)
        if decay.rate:
            step = decay.added(step, master=master, base=base, alpha=alpha)
        master = master + step
        rows.append(as_bits(master))
    return rows


@on_each_device
@pytest.mark.parametrize("name", CASES)
def test_every_optimizer_gives_the_golden_bits(name, device):
    golden = json.loads(GOLDEN.read_text())
    assert apply_all(CASES[name], golden, device) == golden["masters"][name]


def test_the_golden_bits_are_those_of_the_document():
    assert json.loads(GOLDEN.read_text()) == make()


def test_the_documents_example():
    text = (ROOT / "docs" / "updates.md").read_text()
    row = re.compile(r"^\| (\d) \|" + r" ([0-9a-f]{8}) \|" * 6 + "$", re.MULTILINE)
    rows = [[int(cell, 16) for cell in each] for each in row.findall(text)]
    assert [each[0] for each in rows] == [0, 1, 2]
    weight = Weight(0x3F000000, optimizer="adam", weight_decay=0.01)
    optimizer, decay = Adam((0.9, 0.999), 1e-8), Decay(0.01, is_anchored=False)
    states, master = [torch.zeros(1), torch.zeros(1)], as_tensor([0x3F000000])
    for t, gradient, first, second, root, step, after in rows:
        assert weight.update(gradient, t=t, alpha=0.001) == step
        assert (weight.first, weight.second, weight.root, weight.master) == (first, second, root, after)
        found = optimizer.step(as_tensor([gradient]), states, alpha=0.001, number=t)
        found = decay.added(found, master=master, base=None, alpha=0.001)
        master = master + found
        assert [as_bits(each) for each in (*states, found, master)] == [[first], [second], [step], [after]]


def test_weights_are_updated_as_the_document_says(tmp_path):
    keys = {"optimizer": "adam", "alpha": 0.01, "weight_decay": 0.3, "decay_towards": "base"}
    config = make_config(
        tmp_path,
        model=tiny_model(tmp_path / "model", tied=True),
        run_dir=tmp_path / "run",
        **{f"es__{key}": value for key, value in keys.items()},
    )
    updates = [Update(t, [0.3 / (t + 1), -0.7, 0.05 * t], alpha=0.01 / (t + 1)) for t in range(3)]
    with open_session(config) as session:
        weights = session.weights
        before = [master.clone() for _, _, _, master in weights.on_device()]
        for update in updates:
            weights.update(update)
        after = [master.clone() for _, _, _, master in weights.on_device()]
        regions = [region for _, region, _, _ in weights.on_device()]
    draw = np.random.default_rng(0)
    for region, old, new in zip(regions, before, after, strict=True):
        gradients = [
            accumulated(
                torch.zeros(region.num_elements),
                region=region,
                coefficients=update.coefficients,
                directions=range(3),
                seed=config.es.seed,
                iteration=update.iteration,
            )
            for update in updates
        ]
        for i in draw.choice(region.num_elements, size=min(12, region.num_elements), replace=False):
            bits = as_bits(old[i])
            weight = Weight(bits, optimizer="adam", weight_decay=0.3, base=bits)
            for update, gradient in zip(updates, gradients, strict=True):
                weight.update(as_bits(gradient[i]), t=update.iteration, alpha=update.alpha)
            assert as_bits(new[i]) == weight.master


# The operations.


def operands(count=2000):
    """Pairs of finite numbers: of all magnitudes, nearly equal ones, subnormal ones, edges."""
    draw = np.random.default_rng(7)
    a, b = draw.integers(0, 2**32, (2, count), dtype=np.uint32)
    near, tiny = slice(0, count // 4), slice(count // 4, count // 2)
    b[near] = a[near] ^ draw.integers(0, 2**24, count // 4, dtype=np.uint32)
    a[tiny] &= 0x80FFFFFF
    edges = np.array([0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x3F800000, 0x3F7FFFFF], np.uint32)
    edges = np.concatenate([edges, edges | exact.SIGN])
    pairs = np.stack(np.meshgrid(edges, edges)).reshape(2, -1)
    a, b = np.concatenate([a, pairs[0]]), np.concatenate([b, pairs[1]])
    is_finite = (a >> 23 & 255 < 255) & (b >> 23 & 255 < 255) & (b & 0x7FFFFFFF > 0)
    return a[is_finite], b[is_finite]


@pytest.fixture(scope="module")
def known():
    """Operands, and what each operation gives, computed in whole numbers."""
    a, b = operands()
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    of_pairs = (exact.add, exact.subtract, exact.multiply, exact.divide)
    wanted = {function.__name__: [function(*pair) for pair in pairs] for function in of_pairs}
    wanted["square_root"] = [exact.square_root(bits & 0x7FFFFFFF) for bits, _ in pairs]
    return a, b, wanted


OPERATIONS = {
    "add": (torch.add, torch.Tensor.add_),
    "subtract": (torch.sub, torch.Tensor.sub_),
    "multiply": (torch.mul, torch.Tensor.mul_),
    "divide": (torch.div, torch.Tensor.div_),
    "square_root": (lambda a, b: arithmetic.sqrt(a.abs()),),
}
# Ways in which a chunk may lie in memory: kernels for vectors, their remainders, and for strides differ.
LAYOUTS = {
    "as it is": lambda values: values.clone(),
    "strided": lambda values: values.repeat_interleave(3)[::3],
    "begins within a vector": lambda values: torch.cat([values.new_zeros(3), values])[3:],
}


@on_each_device
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_ieee(name, layout, device, known):
    a, b, wanted = known

    def lay(bits):
        return LAYOUTS[layout](as_tensor(bits, device))

    for operation in OPERATIONS[name]:
        assert as_bits(operation(lay(a), lay(b))) == wanted[name]
    assert as_bits(OPERATIONS[name][0](lay(a).view(-1, 1), lay(b).view(-1, 1))) == [
        [bits] for bits in wanted[name]
    ]
    for length in (1, 2, 7, 17):  # shorter than a vector, or a little longer
        for i in range(0, 600, length):
            part = slice(i, i + length)
            assert as_bits(OPERATIONS[name][0](lay(a[part]), lay(b[part]))) == wanted[name][part]


@on_each_device
@pytest.mark.parametrize("name", ["add", "subtract", "multiply"])
def test_operations_with_numbers_are_ieee(name, device, known):
    a = known[0].tolist()
    for number in (0.1, 0.999, 1e-8, 3e-42):
        number = arithmetic.rounded(number)
        wanted = [getattr(exact, name)(bits, exact.bits_of(number)) for bits in a[:500]]
        for operation in OPERATIONS[name]:
            assert as_bits(operation(as_tensor(a[:500], device), number)) == wanted


def hardest_roots(count=3000):
    """The float32 numbers whose roots are closest to the middle between two float32 numbers."""
    middles = np.arange(2**24 + 1, 2**25, 2, dtype=np.int64)
    squares = middles**2
    step = np.where(squares < 2**49, 2**25, 2**26)
    distance = (squares + step // 2) % step - step // 2
    hardest = np.argpartition(np.abs(distance), count)[:count]
    numbers = (squares - distance)[hardest].astype(np.float32)
    assert np.abs(distance[hardest]).min() == 1
    return numbers


@on_each_device
def test_the_hardest_square_roots(device):
    numbers = hardest_roots()
    wanted = [exact.square_root(bits) for bits in numbers.view(np.uint32).tolist()]
    assert as_bits(arithmetic.sqrt(torch.from_numpy(numbers).to(device))) == wanted
    # What rounds them all right even if the root in float64 is off by a unit or two.
    roots = np.sqrt(numbers.astype(np.float64))
    for neighbour in (0, np.inf):
        roots = np.nextafter(np.nextafter(roots, neighbour), neighbour)
        assert as_bits(torch.from_numpy(roots.astype(np.float32))) == wanted
        roots = np.sqrt(numbers.astype(np.float64))


@pytest.mark.exhaustive
@on_each_device
def test_all_square_roots(device):
    """Of all mantissas, with an even and an odd exponent; others are these times powers of 4."""
    numbers = np.arange(0x3F800000, 0x40800000, dtype=np.uint32).view(np.float32)
    found = arithmetic.sqrt(torch.from_numpy(numbers).to(device)).cpu().numpy()
    assert np.array_equal(found, np.sqrt(numbers))  # the processor's instruction, which is IEEE's


def test_powers():
    for base in (0.9, 0.999, 1 - 2**-20):
        for exponent in (0, 1, 2, 3, 17, 1000, 2**31 - 1):
            found = arithmetic.power(base, exponent)
            assert found == power(base, exponent)
            assert found == pytest.approx(base**exponent, rel=1e-6)


# What optimizers are made of.


def run_steps(optimizer):
    gradient, states = torch.linspace(-1, 1, 9), [torch.zeros(9) for _ in optimizer.state_names]
    master, base = torch.linspace(2, 3, 9).bfloat16(), torch.linspace(1, 2, 9).bfloat16()
    with ExactOnly() as mode:
        for number in range(2):
            step = optimizer.step(gradient.clone(), states, alpha=0.3, number=number)
            optimizer.last_step(states, alpha=0.3, number=number)
            for is_anchored in (False, True):
                decay = Decay(0.1, is_anchored=is_anchored)
                decay.added(step, master=master, base=base, alpha=0.3)
    return mode.seen


@pytest.mark.parametrize("name", get_args(EsConfig.model_fields["optimizer"].annotation))
def test_optimizers_use_exact_operations_alone(name):
    assert "aten.sub.Tensor" in run_steps(optimizer_of(EsConfig(iterations=1, optimizer=name)))


@pytest.mark.parametrize("name", get_args(EsConfig.model_fields["optimizer"].annotation))
def test_the_configuration_counts_the_states_of_an_optimizer(name):
    es = EsConfig(iterations=1, optimizer=name)
    assert es.num_optimizer_states == len(optimizer_of(es).state_names)


class FusedMomentum(Momentum):
    def step(self, gradient, states, *, alpha, number):
        return torch.add(gradient, states[0], alpha=self.momentum)


class DividedMomentum(Momentum):
    def step(self, gradient, states, *, alpha, number):
        return gradient / 3.0


class DoubleMomentum(Momentum):
    def step(self, gradient, states, *, alpha, number):
        return gradient * self.momentum


@pytest.mark.parametrize(
    "optimizer",
    [
        AdamVersion1((0.9, 0.999), 1e-8),
        *(each(0.9) for each in (FusedMomentum, DividedMomentum, DoubleMomentum)),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_other_operations_are_found(optimizer):
    with pytest.raises(InexactOperationError):
        run_steps(optimizer)


@on_each_device
def test_exact_devices_are_accepted(device):
    arithmetic.check_arithmetic(torch.device(device))


def test_flushed_subnormals_are_refused():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush them")
    try:
        with pytest.raises(UserError, match="flushed"):
            arithmetic.check_arithmetic(torch.device("cpu"))
    finally:
        torch.set_flush_denormal(False)
