"""The parts of each check, the most valuable first."""

from gpu_check.part import Part

GPU = (
    Part("machine", "machine", 30, "rates of memory, matrix products and copies from the host", needs=()),
    Part(
        "kernels",
        "kernels",
        80,
        "every kernel of noise and digest, bit for bit, against the NumPy definition and the CPU's kernels",
        needs=("triton", "numba", "pytest"),
    ),
    Part("decode", "decode", 180, "7B at random: memory against the plan, time of a token by part, generate"),
    Part(
        "same_bits",
        "same_bits",
        90,
        "every backend and gather, graphs on and off; journals replayed on the CPU",
    ),
    Part(
        "noise",
        "noise_speed",
        40,
        "noise, updates and digest as shares of a copy's bandwidth",
        needs=("numba",),
    ),
    Part(
        "restart",
        "restart",
        75,
        "a run that is killed, and goes on",
        needs=("pydantic", "transformers", "jinja2"),
    ),
    Part("tests", "gpu_tests", 90, "pytest -m gpu", needs=("pytest",)),
    Part(
        "vllm",
        "serve_vllm",
        180,
        "the decode part's prompts through vLLM",
        needs=("vllm", "transformers"),
        fewest_seconds=90,
    ),
)
MULTI_GPU = (
    Part("links", "links", 60, "gathers and sums between ranks, as shares of one another"),
    Part(
        "same_bits", "same_bits_of_ranks", 240, "every backend, gather and number of replicas against one GPU"
    ),
    Part("tensor_parallel", "split", 180, "tensor parallelism at 7B: graphs on and off, time of a token"),
    Part("restart", "restart", 180, "a rank is killed, all end, and the run goes on"),
    Part("hang", "hang", 200, "a rank hangs in a collective, and all end in time"),
    Part(
        "gathers", "gathers", 240, "7B over all ranks: seconds of a member by gather, memory against the plan"
    ),
)
CHECKS = {"gpu": GPU, "multi_gpu": MULTI_GPU}
# Seconds for all parts together.
SECONDS = {"gpu": 520, "multi_gpu": 900}
# A rehearsal's parts take a few seconds each, and longer where kernels are compiled for the first time.
REHEARSAL_SECONDS = 120
