"""Rollout modes: which one `auto` picks, what it does when memory runs out, and the bits of a whole model."""

import contextlib
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import GPT2Config, LlamaConfig

from shardes.distributed.group import Group, Mesh
from shardes.es.update import Perturbation, Update
from shardes.noise.kinds.gaussian import Gaussian
from shardes.rollout import gather_modes as modes
from shardes.rollout import memory
from shardes.rollout.build import make_evaluator
from shardes.rollout.gather_modes import GatherModeSelector
from shardes.rollout.memory import free_bytes, generation_bytes, is_shortage
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.weights.gathered import GatheredWeights
from tests.helpers.models import make_config, tiny_model

CPU = torch.device("cpu")
WORLD = Group(0, 1, CPU)
CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (CPU_ERROR, True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        # Of graphs, modules and kernels, which are no tensors.
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be", 2), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (dist.DistBackendError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("[Errno 12] Cannot allocate memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("out of resource: shared memory, Required: 300000"), False),
        (RuntimeError("shape mismatch"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_counts_as_a_shortage_of_memory(error, wanted):
    assert is_shortage(error) == wanted


def test_free_memory_is_this_ranks_share_of_what_linux_says(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable:    6000 kB\n")
    monkeypatch.setattr(memory, "_container_bytes", lambda path: [])
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert free_bytes(CPU, meminfo=meminfo) == 6000 * 1024
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert free_bytes(CPU, meminfo=meminfo) == 1500 * 1024
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_bytes(CPU, meminfo=meminfo) == 3000 * 1024
    monkeypatch.setattr(memory, "_container_bytes", lambda path: [1000])
    assert free_bytes(CPU, meminfo=meminfo) == 500
    assert free_bytes(CPU, meminfo=tmp_path / "none") == 0


def test_the_limit_of_a_container_counts(tmp_path):
    assert memory._container_bytes(tmp_path) == []
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container_bytes(tmp_path) == []
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._container_bytes(tmp_path) == [300]


def test_generating_needs_the_cache_at_least():
    llama = LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=100
    )
    cache = 2 * 3 * 2 * 16 * 50 * 7 * 2  # keys and values, layers, heads, head size, tokens, rows, bytes
    need = generation_bytes(llama, rows=7, length=50, dtype=torch.bfloat16)
    assert need > cache
    assert generation_bytes(llama, rows=14, length=50, dtype=torch.bfloat16) == 2 * need
    # An answer's tokens are computed one by one: only the prompts' activations are there at the same time.
    inner = llama.intermediate_size
    saved = 7 * 30 * (4 * llama.hidden_size + 3 * inner) * torch.bfloat16.itemsize
    prompts = generation_bytes(llama, rows=7, length=50, dtype=torch.bfloat16, prompt_length=20)
    assert need - prompts == saved
    assert generation_bytes(GPT2Config(), rows=1, length=1, dtype=torch.float32) > 0


class FakeBackend:
    """100 parameters of 2 bytes over two ranks; what it was asked for."""

    name, dtype, device, is_sharded = "fsdp", torch.bfloat16, CPU, True
    sharded_model, whole = "lockstep", "whole"

    def __init__(self):
        self.shards = [SimpleNamespace(name="a", num_elements=60), SimpleNamespace(name="b", num_elements=40)]
        self.calls = []
        self.shortages = 0

    def reserve(self):
        self.calls.append("reserve")
        if self.shortages:
            self.shortages -= 1
            raise CPU_ERROR

    def release(self):
        self.calls.append("release")


def make_modes(monkeypatch, *, free, wanted="auto", mesh=None, trained=2, **attributes):
    backend = FakeBackend()
    for name, value in attributes.items():
        setattr(backend, name, value)
    monkeypatch.setattr(modes, "free_bytes", lambda device: free)
    weights = SimpleNamespace(trained=backend.shards[:trained], seed=0, kind=Gaussian())
    return backend, GatherModeSelector(
        wanted, is_batched=False, backend=backend, weights=weights, mesh=mesh or Mesh(WORLD, WORLD)
    )


@pytest.mark.parametrize(("free", "wanted"), [(450, "iteration"), (449, "member")])
def test_of_an_accelerators_memory_some_is_left(monkeypatch, free, wanted):
    two_gib = 2 * 2**30
    _, chosen = make_modes(monkeypatch, free=two_gib + free, device=torch.device("cuda"))
    assert chosen._fastest_that_fits(50) == wanted


@pytest.mark.parametrize(
    ("free", "trained", "wanted"),
    [
        (450, 2, "iteration"),
        (449, 2, "member"),
        (370, 1, "iteration"),  # of frozen parameters there is one copy
        (250, 2, "member"),
        (249, 2, "layer"),
        (0, 2, "layer"),
    ],
)
def test_auto_is_the_fastest_mode_that_fits(monkeypatch, caplog, free, trained, wanted):
    _, chosen = make_modes(monkeypatch, free=free, trained=trained)
    with caplog.at_level(logging.INFO):
        chosen.choose(50)
        chosen.choose(10**9)  # later problems do not change it
    assert chosen.current.name == wanted
    (line,) = [r.getMessage() for r in caplog.records if "auto is" in r.getMessage()]
    assert line.startswith(f"rollout.gather: auto is {wanted}: iteration needs")
    assert "are free on every rank" in line


def test_auto_goes_by_the_rank_with_the_least_memory(monkeypatch):
    class Poor(Group):
        def min(self, value):
            return min(value, 300)

        def any(self, flag):
            return flag

    world = Poor(0, 2, CPU)
    _, chosen = make_modes(monkeypatch, free=10**9, mesh=Mesh(world, world))
    chosen.choose(50)
    assert chosen.current.name == "member"


def test_auto_gathers_whole_models_only_where_ranks_hold_parts(monkeypatch):
    _, chosen = make_modes(monkeypatch, free=10**9, is_sharded=False)
    chosen.choose(50)
    assert chosen.current.name == "member"


def test_groups_are_replicas_and_with_one_gather_an_iteration_single_ranks(monkeypatch):
    mesh = Mesh(Group(3, 4, CPU), Group(1, 2, CPU))
    for name, size in (("layer", 2), ("member", 2), ("iteration", 1)):
        for is_sharded in (True, False):
            _, chosen = make_modes(monkeypatch, free=0, wanted=name, mesh=mesh, is_sharded=is_sharded)
            assert chosen.current.group.world_size == size
            assert chosen.current.forward_is_collective == (name == "layer" and is_sharded)
            assert not chosen.can_step_down


def test_a_shortage_while_memory_is_reserved_steps_down_with_a_warning(monkeypatch, caplog):
    backend, chosen = make_modes(monkeypatch, free=10**9, shortages=1)
    chosen.choose(50)
    assert chosen.current.name == "member"
    assert backend.calls == ["reserve", "release", "reserve"]
    assert "memory ran out with rollout.gather iteration, so this run goes on with member" in caplog.text
    backend, chosen = make_modes(monkeypatch, free=10**9, shortages=2)
    chosen.choose(50)
    assert chosen.current.name == "layer"
    assert not chosen.can_step_down


def test_a_mode_that_the_user_chose_is_not_left(monkeypatch):
    _, chosen = make_modes(monkeypatch, free=10**9, wanted="iteration", shortages=1)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        chosen.choose(50)
    assert chosen.current.name == "iteration"


def test_other_errors_are_not_taken_for_a_shortage(monkeypatch):
    backend, chosen = make_modes(monkeypatch, free=10**9)

    def reserve():
        raise RuntimeError("something else")

    backend.reserve = reserve
    with pytest.raises(RuntimeError, match="something else"):
        chosen.choose(50)


def bits(model):
    return {name: p.detach().clone().view(torch.uint8) for name, p in model.named_parameters()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy_of_the_centre_is_perturbed_into_the_bits_of_perturbed_shards(tmp_path, dtype):
    model = tiny_model(tmp_path / "model", tied=True)
    config = make_config(
        tmp_path,
        model=model,
        run_dir=tmp_path / "run",
        model__dtype=dtype,
        es__trainable=[".*", "!.*layers.0.*"],
    )
    with contextlib.ExitStack() as stack:
        session, other = (stack.enter_context(open_session(config)) for _ in range(2))
        whole_weights = GatheredWeights(session.backend, session.weights)
        for iteration in range(2):
            whole_weights.refresh()
            assert_same(bits(whole_weights.model), bits(other.backend.gathered()))
            for direction in (0, 3):
                whole_weights.perturb(Perturbation(iteration, direction, 0.01))
                other.weights.perturb(Perturbation(iteration, direction, 0.01))
                assert_same(bits(whole_weights.model), bits(other.backend.gathered()))
                with pytest.raises(AssertionError):
                    other.weights.centre()
                    assert_same(bits(whole_weights.model), bits(other.backend.gathered()))
            whole_weights.centre()
            assert_same(bits(whole_weights.model), bits(other.backend.gathered()))
            for weights in (session.weights, other.weights):
                weights.update(Update(iteration, [0.1, -0.3]))
            other.weights.centre()


def test_the_centre_is_gathered_once_however_many_members_are_made_of_it(tmp_path, monkeypatch):
    model = tiny_model(tmp_path / "model", tied=True)
    with open_session(make_config(tmp_path, model=model, run_dir=tmp_path / "run")) as session:
        gathers = []
        whole = session.backend.gathered
        monkeypatch.setattr(session.backend, "gathered", lambda: gathers.append(None) or whole())
        whole_weights = GatheredWeights(session.backend, session.weights)
        for _ in range(3):
            whole_weights.refresh()
        assert len(gathers) == 1
        session.weights.update(Update(0, [0.1]))
        whole_weights.refresh()
        assert len(gathers) == 2
        whole_weights.release()
        whole_weights.refresh()
        assert len(gathers) == 3


@pytest.mark.parametrize(("backend", "wanted"), [("single", "member"), ("tensor_parallel", "layer")])
def test_backends_without_a_choice_make_none(tmp_path, caplog, backend, wanted):
    model = tiny_model(tmp_path / "model", tied=True)
    config = make_config(tmp_path, model=model, run_dir=tmp_path / "run", parallel__backend=backend)
    with caplog.at_level(logging.INFO), open_session(config) as session:
        rollout, *_ = make_evaluator(session, load_task(config.task))
        assert rollout.engine.gather == wanted
    assert f"rollout.gather: auto is {wanted}: " in caplog.text
