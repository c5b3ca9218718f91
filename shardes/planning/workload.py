"""The work of an iteration: members, prompts and tokens, read from the data if it is there."""

import heapq
import math
from dataclasses import dataclass

from shardes.config.schema import Config
from shardes.errors import UserError
from shardes.rollout.autotune import USUAL_SIZE
from shardes.rollout.batching import shared_prefix
from shardes.rollout.encoding import PromptEncoder, Question
from shardes.rollout.engines.transformers.rows import prefill_parts
from shardes.tasks.base import Task
from shardes.tasks.registry import definition_of
from shardes.utils.limits import LimitError

# Used if neither the data nor the user says how many there are.
ASSUMED_PROMPTS = 200
ASSUMED_PROMPT_TOKENS = 512
# The texts with the most characters are tokenised to find the one with the most tokens.
_NUM_TOKENISED = 64


@dataclass(frozen=True)
class Workload:
    """Work of an iteration.

    Attributes:
        num_members: Most members that an iteration evaluates.
        num_sequences: Answers that a member generates, all turns of episodes counted, or completions whose
            likelihood it computes.
        micro_batch_rows: Sequences in a forward.
        prompt_tokens: Tokens of the longest prompt; for likelihoods, of prompt and completion.
        answer_tokens: Most tokens that are generated; 0 for likelihoods.
        assumed: Descriptions of those numbers that are guesses.
        mean_tokens: Tokens of a prompt that are computed for it, on average: with padding, without what all
            prompts begin with. None: as many as the longest has.
        prefix_tokens: Tokens that all prompts begin with, which are computed once for a member.
    """

    num_members: int
    num_sequences: int
    micro_batch_rows: int
    prompt_tokens: int
    answer_tokens: int
    assumed: tuple[str, ...] = ()
    mean_tokens: float | None = None
    prefix_tokens: int = 0

    @property
    def computed_tokens(self) -> float:
        """Tokens of a prompt that are computed for it, on average."""
        return self.prompt_tokens if self.mean_tokens is None else self.mean_tokens


def make_workload(
    config: Config,
    *,
    task: Task | None = None,
    encoder: PromptEncoder | None = None,
    num_prompts: int | None = None,
    prompt_tokens: int | None = None,
) -> Workload:
    """Determine the work of an iteration of a run.

    Args:
        config: Configuration of the run.
        task: Task with its data; None if the data cannot be read.
        encoder: Makes tokens of prompts; None if the model's tokenizer is not there.
        num_prompts: Prompts of an iteration; None to take them from the configuration and the data.
        prompt_tokens: Tokens of the longest prompt; None to measure them in the data.
    """
    es, rollout, assumed = config.es, config.rollout, []
    population = es.population
    num_members = max(population.values()) if isinstance(population, dict) else population
    if num_prompts is None:
        num_prompts = config.task.batch_size
        if task is not None:
            num_prompts = min(num_prompts or len(task.train), len(task.train))
    if num_prompts is None:
        num_prompts = ASSUMED_PROMPTS
        assumed.append(f"{num_prompts} prompts in an iteration (--num-prompts)")
    num_prompts = min(num_prompts, es.prompts_per_member or num_prompts)
    definition = definition_of(config.task.name, label_words=config.task.label_words)
    is_scored = definition is not None and definition.choices is not None
    per_prompt: float = rollout.samples_per_prompt
    if is_scored:
        per_prompt = _choices_per_prompt(task) or len(config.task.label_words or [])
        if not per_prompt:
            per_prompt = 1
            assumed.append("one completion to each prompt")
    num_turns, mean, prefix = 1, None, 0
    if config.task.is_episodic:
        num_turns = config.task.max_turns
        assumed.append(f"all {num_turns} turns of every episode (task.max_turns)")
        if rollout.max_context is not None and prompt_tokens is None:
            prompt_tokens = max(1, rollout.max_context - rollout.max_new_tokens)
    elif prompt_tokens is None and task is not None and encoder is not None:
        leaves_out = config.task.on_prompt_error == "exclude"
        prompt_tokens = longest_prompt(task, encoder, leaves_out=leaves_out)
        size = rollout.micro_batch_size
        num_rows = size if isinstance(size, int) else USUAL_SIZE
        mean, prefix = computed_tokens(task, encoder, num_rows=min(num_rows, len(task.train)))
        mean = min(mean, prompt_tokens)
    if prompt_tokens is None:
        prompt_tokens = ASSUMED_PROMPT_TOKENS
        assumed.append(f"prompts of up to {prompt_tokens} tokens (--prompt-tokens)")
    num_episodes = round(num_prompts * per_prompt)
    rows = rollout.micro_batch_size
    if not isinstance(rows, int):
        rows = USUAL_SIZE  # with which rollout.gather is chosen; see Plan.with_rows_found
    return Workload(
        num_members,
        num_episodes * num_turns,
        min(rows, num_episodes),
        prompt_tokens,
        0 if is_scored else rollout.max_new_tokens,
        tuple(assumed),
        mean,
        prefix,
    )


def computed_tokens(task: Task, encoder: PromptEncoder, *, num_rows: int) -> tuple[float, int]:
    """Return the tokens that are computed for a prompt, and those that are computed once for all prompts.

    They are of some rows over all of the data, padded as a run pads them.

    Args:
        task: Task with its data, whose longest prompts can be asked.
        encoder: Makes tokens of its prompts.
        num_rows: Prompts in a micro-batch.

    Returns:
        The mean number of tokens, padded, but without what all prompts begin with; and the length of that.
    """
    rows = task.train[:: max(1, len(task.train) // _NUM_TOKENISED)]
    questions = [Question.of(task, row) for row in rows]
    problems = encoder.encode_ahead(questions)
    asked = [each for each, problem in zip(questions, problems, strict=True) if problem is None]
    encoded = [encoder.encode(question) for question in asked]
    if not encoded:
        return math.inf, 0
    lengths = sorted(each.num_tokens for each in encoded)
    cuts = [tuple(lengths[low : low + num_rows]) for low in range(0, len(lengths), num_rows)]
    if task.choices is not None:
        return sum(cut[-1] * len(cut) for cut in cuts) / len(lengths), 0
    prefix = len(shared_prefix([list(each.prompts[0]) for each in encoded]))
    parts = [(cut, part) for cut in cuts for part in prefill_parts(cut, num_members=1)]
    padded = sum(cut[part.stop - 1] * (part.stop - part.start) for cut, part in parts)
    return padded / len(lengths) - prefix, prefix


def longest_prompt(task: Task, encoder: PromptEncoder, *, leaves_out: bool = False) -> int:
    """Return the tokens of the longest prompt; for likelihoods, of prompt and completion.

    Args:
        task: Task with its data.
        encoder: Makes tokens of its prompts.
        leaves_out: Whether a prompt that cannot be asked is left out, if others are left.

    Raises:
        UserError: One of the longest cannot be asked.
    """
    rows = heapq.nlargest(_NUM_TOKENISED, task.train, key=lambda row: len(str(row)))
    questions = [Question.of(task, row) for row in rows]
    try:
        problems = list(encoder.encode_ahead(questions))
    except LimitError as error:
        raise UserError(f"task: the chat template or the tokenizer {error} for a prompt") from None
    asked = [each for each, problem in zip(questions, problems, strict=True) if problem is None]
    if not asked or (len(asked) < len(questions) and not leaves_out):
        raise UserError(f"task: {next(filter(None, problems))}")
    return max(encoder.encode(question).num_tokens for question in asked)


def _choices_per_prompt(task: Task | None) -> float:
    """Return the mean number of completions of a prompt; 0 if that is not known."""
    if task is None or task.choices is None:
        return 0.0
    return sum(len(task.choices(row).completions) for row in task.train) / len(task.train)
