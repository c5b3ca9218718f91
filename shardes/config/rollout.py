"""The section ``rollout`` of a configuration."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator

from shardes.config.section import Registered, Section
from shardes.rollout.engines.registry import DEFAULT_ENGINE, ENGINES

# Prompts per forward on CPUs, if the user does not say.
CPU_MICRO_BATCH_SIZE = 32


class RolloutConfig(Section):
    """Generation of the members' answers."""

    engine: Annotated[str, Registered("engine", lambda: [*ENGINES, "auto"])] = "auto"
    """What generates and scores. ``transformers``: the model's own forward in a decode loop. ``vllm``: vLLM,
    which goes with ``parallel.backend: vllm`` alone. ``auto``: ``vllm`` for that backend, else
    ``transformers``."""
    gather: Literal["auto", "iteration", "member", "layer"] = "auto"
    """Unit of work for which weights are gathered from their shards. ``iteration``: the centre, once an
    iteration, into a whole model on every rank; each rank evaluates members of its own, adding their noise to
    its copy, and holds two copies. ``member``: each member's weights, once, into a whole model on every rank;
    the ranks of a replica share its prompts. ``layer``: every layer in every forward, all ranks of a replica
    in step. ``auto``: the first of the three for which every rank has the memory, and the next one where
    memory runs out all the same; ``layer`` for ``tensor_parallel`` and ``vllm``, which have no other. All
    give the same bits. Where every rank holds a whole model anyway (``single``, or a ``shard_size`` of 1),
    there is no second copy, and ``iteration`` says only that ranks do not share prompts. With several members
    in a forward the model stays the centre, and ``iteration`` takes one copy."""
    members_per_forward: Annotated[int, Field(gt=0)] | Literal["auto"] = 1
    """Members whose prompts are rows of one forward. More than 1, or ``auto``, needs ``es.noise: low_rank``:
    members are terms added to what the layers of the centre compute, and each costs less, the more there are,
    but takes memory for a cache of its own. Like ``micro_batch_size`` the number may change the last bits, so
    a run keeps to one. ``auto``: as many as fit when the run begins, at most 64; the run keeps what was
    found. The engine ``vllm`` takes a number, and trains the matrices of linear layers alone."""
    micro_batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] | None = None
    """Prompts per forward. Micro-batches are composed from the data alone, so results do not depend on the
    number of ranks; a different size may change the last bits. ``auto``: as many as memory allows and as give
    every rank work, found by trying when a run begins; the run keeps what was found. null: ``auto`` on GPUs,
    where a forward of few rows takes as long as one of many, and 32 on CPUs."""
    max_new_tokens: int = Field(gt=0)
    """The longest answer, in tokens; of an episode, the longest of a turn."""
    max_context: int | None = Field(default=None, gt=1)
    """Tokens of an episode at most, all turns together; one that has no room for a further answer counts as
    truncated, with what it has earned. null: as many as the model has positions."""
    stop: list[str] = []
    """Texts that end an answer, which keeps the first of them; end-of-sequence tokens always do. A text may
    be, or have in it, a special token, such as ``<|im_end|>``."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text that rewards and samples have. false: rewards see them, for models
    whose ``<think>`` or ``<tool_call>`` is a special token; the token that ends an answer is left out all the
    same."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0: the most likely token is taken, as in the paper. Above: tokens are drawn, the logits divided by it.
    The random numbers depend on seed, iteration, prompt, sample and position alone: all members have the
    same."""
    top_k: int | None = Field(default=None, gt=0)
    """Tokens are drawn from that many of the most likely ones; null: from all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Tokens are drawn from the most likely ones that together reach this probability."""
    samples_per_prompt: int = Field(default=1, gt=0)
    """Answers to each prompt. ``task.objective`` says what a member earns by them."""
    cudnn_attention: bool = False
    """Let torch's attention use the kernels of cuDNN on GPUs. They need a plan for each shape, of which eager
    decoding has a new one at every token, and wrong answers of some models were reported on B200 (torch 2.11
    and 2.13). Without it, attention is computed by torch's own kernels. It may change the last bits."""
    kv_cache_gib: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """GiB on each rank for the keys and values of the engine ``vllm``. null: what the weights, their masters
    and the optimizer leave of an accelerator; on CPUs at most 4."""
    batch_invariant: bool = False
    """Have the engine ``vllm`` use kernels whose results do not depend on which prompts are computed together
    (VLLM_BATCH_INVARIANT; slower, on GPUs of compute capability 9.0 or more)."""
    vllm: dict[str, bool | int | float | str] = {}
    """Further arguments of ``vllm.LLM`` by name, such as ``max_model_len``, ``max_num_seqs`` or
    ``enforce_eager``."""

    @property
    def is_batched(self) -> bool:
        """Return whether several members share a forward."""
        return self.members_per_forward != 1

    def on_device(self, device_type: str) -> Self:
        """Return the settings with what null stands for on a type of device, ``cuda`` or ``cpu``."""
        if self.micro_batch_size is not None:
            return self
        # An engine with a schedule of its own does not compute by micro-batches.
        is_scheduled = self.engine != DEFAULT_ENGINE
        size = CPU_MICRO_BATCH_SIZE if device_type == "cpu" or is_scheduled else "auto"
        return self.model_copy(update={"micro_batch_size": size})

    @field_validator("stop")
    @classmethod
    def _stop_texts_are_texts(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError(f"got {value}; an empty text would end every answer before it begins")
        return value

    @field_validator("top_k", "top_p", "samples_per_prompt")
    @classmethod
    def _drawing_takes_a_temperature(cls, value: Any, info: ValidationInfo) -> Any:
        default = cls.model_fields[str(info.field_name)].default
        if value != default and info.data.get("temperature") == 0:
            raise ValueError(
                f"got {value}, but rollout.temperature is 0, so that the most likely token is always taken; "
                f"set that above 0, or this to {default}"
            )
        return value
