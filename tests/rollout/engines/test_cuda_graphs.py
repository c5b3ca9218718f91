"""Decoding steps that are captured, with a capture that only remembers the function."""

import contextlib
import copy
import threading
from types import SimpleNamespace

import pytest
import torch

from shardes.rollout.batching import LEAST_PREFIX, shared_prefix
from shardes.rollout.engines.transformers import cuda_graphs
from shardes.rollout.engines.transformers.cuda_graphs import ladder
from shardes.rollout.engines.transformers.decoder import Completions, Decoder
from tests.helpers.decoding import BUDGET, EVERY, PAD, Remembered, Rows, composed, generated, random_prompts

CAPTURED = [name for name in EVERY if name not in ("gemma2", "gemma3")]


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_steps_give_the_same_answers(models, name):
    model = models[name]
    decoder = Decoder(
        eos_ids=[3, 12, 9, 20, 33, 28], pad_id=PAD, max_new_tokens=BUDGET, make_graph=Remembered
    )
    Remembered.made, sizes = 0, set()
    for seed in (0, 1):
        prompts = random_prompts(seed, num_prompts=19, prefix_length=LEAST_PREFIX)
        batch = composed(prompts)
        with Rows(model) as seen:
            for prefix in (None, torch.tensor([shared_prefix(prompts)])):
                decoder.begin(model, prefix)
                assert decoder.decode(model, batch).tokens == generated(
                    model, batch, eos_ids=[3, 12, 9, 20, 33, 28]
                )
        sizes |= {rows for rows, width in seen if width == 1}
    assert sizes <= set(ladder(19))
    assert Remembered.made == len(sizes), "batches of the same sizes share what was captured"
    assert name == "gpt_neox" or len(sizes) == 2, "a shrunken batch was meant to have a step of its own"
    assert decoder._graphs.is_usable


def test_the_sizes_that_are_captured_are_halves():
    assert ladder(64) == [64, 32, 16, 8]
    assert ladder(19) == [19, 10]
    assert ladder(5) == [5]


def test_what_cannot_be_captured_is_decoded_step_by_step_with_one_warning(models, caplog):
    model, batch = models["qwen2"], composed(random_prompts(0))
    wanted = generated(model, batch, eos_ids=[3])

    def fails(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    decoder = Decoder(eos_ids=[3], pad_id=PAD, max_new_tokens=BUDGET, make_graph=fails)
    for _ in range(2):
        decoder.begin(model)
        assert decoder.decode(model, batch).tokens == wanted
    assert [record.message for record in caplog.records] == [
        "Qwen2ForCausalLM cannot be captured as a CUDA graph (RuntimeError: operation not permitted when "
        "stream is capturing), so each token is decoded kernel by kernel"
    ]


def test_a_capture_that_finds_no_memory_says_so(models):
    # As the instantiation of a graph does: no tensor was allocated.
    def fails(function):
        raise torch.AcceleratorError("CUDA error: out of memory", 2)

    decoder = Decoder(eos_ids=[3], pad_id=PAD, max_new_tokens=BUDGET, make_graph=fails)
    decoder.begin(models["qwen2"])
    with pytest.raises(torch.AcceleratorError, match="out of memory"):
        decoder.decode(models["qwen2"], composed(random_prompts(0)))


def test_a_capture_that_gives_other_logits_is_not_used(models, caplog):
    model, batch = models["qwen2"], composed(random_prompts(0))

    class Stale(Remembered):
        def replay(self):
            for parameter in model.parameters():
                parameter.data.mul_(1.5)
            self._function()
            for parameter in model.parameters():
                parameter.data.div_(1.5)

    decoder = Decoder(eos_ids=[3], pad_id=PAD, max_new_tokens=BUDGET, make_graph=Stale)
    decoder.begin(model)
    assert decoder.decode(model, batch).tokens == generated(model, batch, eos_ids=[3])
    assert "other logits" in caplog.text


def test_a_member_that_is_not_finite_does_not_spoil_the_next(models):
    model, batch = models["mistral"], composed(random_prompts(0))
    wanted = generated(model, batch, eos_ids=[3])
    for make_graph in (None, Remembered):
        decoder = Decoder(eos_ids=[3], pad_id=PAD, max_new_tokens=BUDGET, make_graph=make_graph)
        handle = model.model.layers[0].register_forward_hook(
            lambda module, args, states: states * float("nan")
        )
        decoder.begin(model)
        assert not decoder.decode(model, batch).is_finite
        handle.remove()
        assert decoder.decode(model, batch) == Completions(wanted, [True] * len(wanted))


# Ranks that compute parts of the same forwards, as threads: each forward and each agreement is a collective.


class Ranks:
    """Two ranks, which must come to the same collectives in the same order."""

    def __init__(self):
        self._barrier, self._said = threading.Barrier(2, timeout=60), [None, None]

    def meet(self, rank, what):
        """Return what both ranks said; fails where one is not there, or at another collective."""
        self._said[rank] = what
        self._barrier.wait()
        said = list(self._said)
        self._barrier.wait()
        assert type(said[0]) is type(said[1]), f"the ranks are at different collectives: {said}"
        return said

    def run(self, function):
        """Run a function of the rank on both; returns their results or errors."""
        found = [None, None]

        def one(rank):
            try:
                found[rank] = function(rank)
            except BaseException as error:
                found[rank] = error  # the other one waits in vain, but not for long

        threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        return found


class FailsAtTheEnd(Remembered):
    def __init__(self, function):
        super().__init__(function)
        raise RuntimeError("operation failed due to a previous error during capture")


class HasNoMemory(Remembered):
    def __init__(self, function):
        super().__init__(function)
        raise torch.OutOfMemoryError("out of memory")


class IsWrong(Remembered):
    def replay(self):
        self._function()
        for cell in self._function.__closure__:  # the step's logits
            if isinstance(owner := cell.cell_contents, cuda_graphs.StepGraphs):
                for logits in owner._logits.values():
                    logits.add_(1.0)


def decode_split(model, batch, make_graphs):
    """What two ranks decode, which capture with a function each; and whether their graphs are in use."""
    ranks = Ranks()

    def decode(rank):
        mine = copy.deepcopy(model)
        mine.register_forward_pre_hook(lambda *arguments: ranks.meet(rank, "forward") and None)
        decoder = Decoder(eos_ids=[3], pad_id=PAD, max_new_tokens=BUDGET, make_graph=make_graphs[rank])
        answers = []
        for _ in range(2):
            decoder.begin(mine)
            found = decoder.decode(
                mine, batch, any_rank=lambda flag: any(ranks.meet(rank, bool(flag))), is_split=True
            )
            answers.append(found.tokens)
        return answers, decoder._graphs is not None and decoder._graphs.is_usable

    return ranks.run(decode)


@pytest.mark.parametrize(
    "other", [Remembered, FailsAtTheEnd, IsWrong, None], ids=["captures", "fails", "is wrong", "cannot"]
)
def test_ranks_use_captured_steps_together_or_not_at_all(models, caplog, other):
    model, batch = models["qwen2"], composed(random_prompts(0, num_prompts=19))
    wanted = [generated(model, batch, eos_ids=[3])] * 2
    is_used = other is Remembered
    assert decode_split(model, batch, [Remembered, other]) == [(wanted, is_used)] * 2
    if other not in (Remembered, None):
        assert "another rank could not" in caplog.text


def test_no_rank_waits_for_one_without_memory(models):
    model, batch = models["qwen2"], composed(random_prompts(0))
    found = decode_split(model, batch, [Remembered, HasNoMemory])
    assert [type(each) for each in found] == [torch.OutOfMemoryError] * 2


# torch.cuda, as far as a capture goes: the current stream, and what each stream and pool was used for.


class FakeCuda:
    def __init__(self):
        self.current, self.pools, self.captures, self.fails_to_begin = "default", 0, [], False

    def Stream(self):  # noqa: N802 (torch's name)
        stream = SimpleNamespace(waited=[])
        stream.wait_stream = stream.waited.append
        return stream

    def current_stream(self):
        return self.current if self.current != "default" else self.default

    default = SimpleNamespace(wait_stream=lambda stream: None)

    def set_stream(self, stream):
        self.current = stream

    def graph_pool_handle(self):
        self.pools += 1
        return (0, self.pools)

    def CUDAGraph(self):  # noqa: N802
        return SimpleNamespace(reset=lambda: None, replay=lambda: None)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        """As torch's, which enters the stream before the capture, and leaves it only after a good end."""
        self.captures.append((pool, stream, capture_error_mode))
        before, self.current = self.current, stream
        if self.fails_to_begin:
            raise RuntimeError("cannot begin")
        yield
        self.current = before


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(cuda_graphs.torch, "cuda", fake)
    return fake


def test_graphs_of_one_cache_share_a_pool_and_others_have_their_own(cuda):
    first, calls = cuda_graphs.CudaGraphs(), []
    for _ in range(2):
        first(lambda: calls.append(cuda.current))
    second = first.renewed()
    second(lambda: None)
    assert len(calls) == 2 * (cuda_graphs.WARM_UPS + 1)
    assert cuda.current_stream() is cuda.default
    pools, streams, modes = zip(*cuda.captures, strict=True)
    assert pools == ((0, 1), (0, 1), (0, 2))
    assert len({id(stream) for stream in (*streams, *calls)}) == 1
    assert set(modes) == {"thread_local"}


@pytest.mark.parametrize("fails", ["in the warm-up", "before the capture", "in the capture"])
def test_a_capture_that_fails_leaves_no_trace(cuda, fails):
    graphs, calls = cuda_graphs.CudaGraphs(), []
    graphs(lambda: None)

    def function():
        calls.append(cuda.current)
        if len(calls) > (cuda_graphs.WARM_UPS if fails == "in the capture" else 0) and fails[:3] == "in ":
            raise RuntimeError("cannot go on")

    cuda.fails_to_begin = fails == "before the capture"
    with pytest.raises(RuntimeError, match="cannot"):
        graphs(function)
    assert cuda.current_stream() is cuda.default
    cuda.fails_to_begin = False
    graphs(lambda: None)
    (pool, stream, _), *_, (new_pool, new_stream, _) = cuda.captures
    assert pool != new_pool and stream is not new_stream


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt_neox"])
def test_captured_steps_on_a_device_give_the_models_own_tokens(models, name):
    model = models[name].to("cuda")
    try:
        batch = composed(random_prompts(0, num_prompts=19)).to("cuda")
        decoder = Decoder(eos_ids=[3, 12], pad_id=PAD, max_new_tokens=BUDGET)
        wanted = generated(model, batch, eos_ids=[3, 12])
        for _ in range(2):
            decoder.begin(model)
            assert decoder.decode(model, batch).tokens == wanted
        assert decoder._graphs.is_usable
        # A member's weights are written where the captured ones were.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
        assert decoder.decode(model, batch).tokens == generated(model, batch, eos_ids=[3, 12])
    finally:
        models[name].to("cpu")
