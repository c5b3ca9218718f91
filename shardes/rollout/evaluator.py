"""A batch of problems, answered and scored by some ranks under the weights of the moment."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from shardes.backends.base import Backend
from shardes.config.schema import RolloutConfig
from shardes.distributed.group import Group, Mesh
from shardes.es.update import Perturbation
from shardes.models.build import end_tokens, max_positions
from shardes.rewards.scorer import Scorer
from shardes.rollout.aggregate import (
    ChoiceSet,
    CompletionAccumulator,
    Evaluation,
    LogLikelihoodAccumulator,
    RewardAccumulator,
    choice_set,
)
from shardes.rollout.batching import MicroBatch, compose, shared_prefix, tokenize
from shardes.rollout.engines.sampling import TokenSampler
from shardes.rollout.engines.stop_strings import StopStrings
from shardes.rollout.engines.transformers.decoder import Completions, Decoder, OnRows
from shardes.rollout.engines.transformers.likelihood import (
    LikelihoodBatch,
    compose_likelihood_batches,
    log_likelihoods,
)
from shardes.rollout.gather_modes import BatchedGather, GatherMode, GatherModeSelector
from shardes.rollout.memory import (
    MemoryShortageError,
    free_bytes,
    generation_bytes,
    is_shortage,
    likelihood_bytes,
)
from shardes.rollout.prompts import PromptBatch
from shardes.tasks.base import Choices, Prompt, Row, Task
from shardes.utils.timers import PhaseTimer


@dataclass(frozen=True)
class Pending:
    """An evaluation of which this rank has done its part, but for the scores.

    Attributes:
        tally: What is known so far.
        group: The ranks that share the problems.
        is_short: Whether this rank had too little memory.
        is_broken: Whether this rank's model computed something that is not finite.
    """

    accumulator: RewardAccumulator
    group: Group
    is_short: bool
    is_broken: bool


@dataclass(frozen=True)
class PendingChunk:
    """As ``Pending``, of several members that answered in the same forwards.

    Attributes:
        tallies: What is known of each so far.
        are_broken: Whether the model computed something that is not finite for it.
        is_short: Whether this rank had too little memory.
    """

    accumulators: list[RewardAccumulator]
    are_broken: list[bool]
    is_short: bool


class Evaluator:
    """Generates and scores.

    Args:
        backend: The model.
        tokenizer: The model's.
        mesh: The ranks.
        scorer: Has answers judged; its task is the one that is trained on.
        modes: How a member's weights become a model.
        settings: How prompts are answered.
        seed: The run's.
        timer: Where the time goes.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        tokenizer: Any,
        mesh: Mesh,
        scorer: Scorer,
        modes: GatherModeSelector,
        settings: RolloutConfig,
        seed: int,
        timer: PhaseTimer,
    ) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._scorer = scorer
        self._modes = modes
        self._settings = settings
        self._seed = seed
        self._timer = timer
        self._stop = StopStrings(settings.stop, tokenizer)
        self._sampling = None
        if settings.temperature > 0:
            self._sampling = TokenSampler(
                seed, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
            )
        self._decoder = Decoder(
            eos_ids=end_tokens(backend.sharded_model, tokenizer),
            pad_id=tokenizer.pad_token_id,
            max_new_tokens=settings.max_new_tokens,
            stop=self._stop,
            sampling=self._sampling,
        )

    def prepare(self, rows: Sequence[Row], *, iteration: int, scorer: Scorer | None = None) -> PromptBatch:
        """Renders, tokenises and cuts a batch of problems.

        Args:
            rows: The problems.
            iteration: Whose random numbers draw the answers, if they are drawn.
            scorer: Of the task that the problems are of; None: the one that is trained on.
        """
        settings, device = self._settings, self._mesh.world.device
        scorer = scorer or self._scorer
        prompts = [scorer.task.make_prompt(row) for row in rows]
        if scorer.task.choices is not None:
            return self._prepare_choices(rows, prompts, scorer.task.choices, scorer)
        tokens = [tokenize(prompt, self._tokenizer) for prompt in prompts]
        count = settings.samples_per_prompt
        batches = compose(
            [prompt for prompt in tokens for _ in range(count)],
            micro_batch_size=self.micro_batch_size,
            pad_id=self._tokenizer.pad_token_id,
            max_new_tokens=settings.max_new_tokens,
            max_positions=max_positions(self._backend.sharded_model),
        )
        if self._sampling is not None:
            for i, batch in enumerate(batches):
                uniforms = self._sampling.uniforms(
                    iteration=iteration,
                    prompts=[answer // count for answer in batch.rows],
                    samples=[answer % count for answer in batch.rows],
                    num_tokens=settings.max_new_tokens,
                )
                batches[i] = replace(batch, uniforms=uniforms)
        shared = shared_prefix(tokens)
        prefix = torch.tensor([shared], device=device) if shared else None
        return PromptBatch(rows, prompts, scorer, count, [batch.to(device) for batch in batches], prefix)

    def drawing(self) -> "Evaluator":
        """One that draws answers at temperature 1 instead, one to each prompt, with the same mode."""
        changes = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "samples_per_prompt": 1}
        return Evaluator(
            self._backend,
            tokenizer=self._tokenizer,
            mesh=self._mesh,
            scorer=self._scorer,
            modes=self._modes,
            settings=self._settings.model_copy(update=changes),
            seed=self._seed,
            timer=self._timer,
        )

    def release(self) -> None:
        """Frees what generating keeps between members."""
        self._decoder.release()

    def tokens_of(self, task: Task) -> list[list[int]]:
        """The tokens of a task's prompts."""
        return [tokenize(task.make_prompt(row), self._tokenizer) for row in task.train]

    def prepare_pairs(self, pairs: Sequence[Sequence[list[int]]], *, scorer: Scorer) -> PromptBatch:
        """The likelihood of given tokens as problems.

        Args:
            pairs: The tokens of each prompt and of what follows it.
            scorer: Of a task whose metric is wanted of them.
        """
        texts = [self._text(completion) for _, completion in pairs]
        choices = ChoiceSet(
            prompts=[self._text(prompt) for prompt, _ in pairs],
            choices=[Choices([text], gold=0) for text in texts],
            pairs=[(prompt, completion) for prompt, completion in pairs],
            first_pairs=range(len(pairs) + 1),
        )
        return self._of_pairs([{} for _ in pairs], list(choices.prompts), choices, scorer)

    def _prepare_choices(
        self,
        rows: Sequence[Row],
        prompts: list[Prompt],
        choices_of: Callable[[Row], Choices],
        scorer: Scorer,
    ) -> PromptBatch:
        """The same for a likelihood task: pairs of a prompt and each of its completions."""
        choices = choice_set(
            prompts,
            [choices_of(row) for row in rows],
            self._tokenizer,
            max_positions=max_positions(self._backend.sharded_model),
        )
        return self._of_pairs(rows, prompts, choices, scorer)

    def _of_pairs(
        self, rows: Sequence[Row], prompts: list[Prompt], choices: ChoiceSet, scorer: Scorer
    ) -> PromptBatch:
        batches = compose_likelihood_batches(
            [prompt for prompt, _ in choices.pairs],
            [completion for _, completion in choices.pairs],
            micro_batch_size=self.micro_batch_size,
            pad_id=self._tokenizer.pad_token_id,
        )
        batches = [batch.to(self._mesh.world.device) for batch in batches]
        return PromptBatch(rows, prompts, scorer, 1, batches, choices=choices)

    @property
    def micro_batch_size(self) -> int:
        """Prompts per forward."""
        assert self._settings.micro_batch_size != "auto", "what auto is must be found first"
        return self._settings.micro_batch_size

    @micro_batch_size.setter
    def micro_batch_size(self, size: int) -> None:
        self._settings = self._settings.model_copy(update={"micro_batch_size": size})

    @property
    def samples_per_prompt(self) -> int:
        """Answers to each prompt."""
        return self._settings.samples_per_prompt

    @property
    def members_per_forward(self) -> int:
        """Members whose prompts are rows of the same forward; 1 unless the mode is a batched one."""
        count = self._settings.members_per_forward
        # Before it is found what auto is, there are no members to evaluate, only the centre.
        return 1 if count == "auto" or not self._modes.are_batched else count

    @members_per_forward.setter
    def members_per_forward(self, count: int) -> None:
        self._settings = self._settings.model_copy(update={"members_per_forward": count})

    @property
    def num_together(self) -> int:
        """Ranks that each compute a part of the same forward."""
        return self._mesh.shard.world_size if self._backend.needs_same_batch else 1

    @property
    def num_sharers(self) -> int:
        """Ranks that share a member's micro-batches; known once ``begin`` was called."""
        return 1 if self._backend.needs_same_batch else self.mode.team.world_size

    def fits(self, problems: PromptBatch) -> bool:
        """Whether this rank has the memory for the longest micro-batch; a collective of the team."""
        batch = problems.micro_batches[-1].for_members(self.members_per_forward)
        device = self._mesh.world.device
        # Trying is no choice where too much memory ends the process instead of raising an error, or where the
        # other ranks would wait for the rest of a collective: then a formula has to do.
        needed = self._bytes_for(problems.micro_batches[-1])
        if (device.type == "cpu" or self.mode.forward_is_collective) and needed > free_bytes(device):
            return False
        if self.mode.forward_is_collective:
            return True
        try:
            model = self.mode.model()
            if isinstance(batch, LikelihoodBatch):
                log_likelihoods(model, batch)
            else:
                self._decoder.begin(model, problems.prefix)
                self._decoder.decode(model, batch, most_tokens=2)
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            return False
        finally:
            self._decoder.release()
        return True

    @property
    def _any_rank(self) -> Callable[[bool], bool] | None:
        """What asks the ranks that go on together; None if this one goes by itself."""
        return self._mesh.shard.any if self.mode.forward_is_collective else None

    @property
    def mode(self) -> GatherMode:
        """How members are evaluated; known once ``begin`` was called."""
        return self._modes.current

    @property
    def mode_name(self) -> str | None:
        """Its name in ``rollout.gather``; None if it is not known yet."""
        return self._modes.name

    def begin(self, problems: PromptBatch) -> None:
        """Comes before any number of evaluations of the same weights; a collective of all ranks."""
        self._modes.choose(max(map(self._bytes_for, problems.micro_batches), default=0))
        with self._timer("gather"):
            self.mode.begin()

    def _bytes_for(self, batch: MicroBatch | LikelihoodBatch) -> int:
        """About what a micro-batch takes besides weights."""
        config: Any = self._backend.sharded_model.config
        rows, width = batch.input_ids.shape
        rows *= self.members_per_forward
        dtype = self._backend.dtype
        sharers = self.num_together
        if isinstance(batch, LikelihoodBatch):
            return likelihood_bytes(config, rows=rows, length=width, dtype=dtype, num_sharers=sharers)
        length = width + self._settings.max_new_tokens
        return generation_bytes(config, rows=rows, length=length, dtype=dtype, num_sharers=sharers)

    def step_down(self) -> None:
        """After a shortage of memory: goes on in a mode that takes less; a collective of all ranks."""
        self._decoder.release()
        self._modes.step_down()

    def evaluate(self, problems: PromptBatch, *, group: Group, keeps_samples: bool = False) -> Evaluation:
        """Answers and scores the problems under the current weights; a collective.

        Args:
            problems: What to answer.
            group: The ranks that share the micro-batches: a team, or all.
            keeps_samples: Whether every answer is kept, on the rank that gave it.

        Raises:
            MemoryShortageError: On every rank of the group, if one had too little memory, and if there is a
                mode that takes less.
        """
        return self.finish(self.start(problems, group=group, keeps_samples=keeps_samples))

    def start(self, problems: PromptBatch, *, group: Group, keeps_samples: bool = False) -> Pending:
        """Answers the problems under the current weights, without waiting for scores; a collective.

        The weights may change afterwards. Evaluations are finished in the order in which they were started.
        """
        with self._timer("gather"):
            model = self.mode.model()
        accumulator = self.accumulator(problems, keeps_samples=keeps_samples)
        shard, forward_is_collective = self._mesh.shard, self.mode.forward_is_collective
        # Ranks that need the same batch take turns together, and the first of them scores.
        together = self.num_together
        stride, place = group.world_size // together, group.rank // together
        # In step, ranks of a replica go on for as long as its first has a micro-batch.
        leader = (group.rank - shard.rank) // together if forward_is_collective else place
        batches = problems.micro_batches
        is_short = is_broken = False
        for first in range(0, len(batches), stride):
            mine = first + place
            if first + leader >= len(batches):
                break
            # A rank without a micro-batch of its own repeats another's, so that all call alike.
            is_idle = mine >= len(batches)
            batch = batches[first + leader if is_idle else mine]
            is_counted = not is_idle and (together == 1 or shard.is_main)
            with self._timer("rollout"):
                found = self._forward(model, problems, batch, is_first=first == 0)
                if found is not None and is_counted:
                    accumulator.take(batch.rows, found, is_first=mine == 0)
            if found is None:
                is_short = True
                break
            if isinstance(found, Completions):
                is_broken |= not found.is_finite
            with self._timer("reward"):
                accumulator.send(is_last=False)
        with self._timer("reward"):
            accumulator.send(is_last=True)
        return Pending(accumulator, group, is_short, is_broken)

    def start_chunk(self, problems: PromptBatch, members: Sequence[Perturbation]) -> PendingChunk:
        """Has several members answer the problems in the same forwards, on this rank.

        A collective of a replica's ranks where these are in step. Each may have members of its own, unless
        each computes a part of the same forwards; then the first of them scores.
        """
        mode, count = self.mode, len(members)
        is_counted = self.num_together == 1 or self._mesh.shard.is_main
        assert isinstance(mode, BatchedGather), "other modes evaluate members one by one"
        with self._timer("gather"):
            model = mode.model()
        with self._timer("perturb"):
            mode.hooks.load(members)
        accumulators = [self.accumulator(problems) for _ in members]
        are_broken = [False] * count
        with mode.hooks.on(model):
            for number, batch in enumerate(problems.micro_batches):
                with self._timer("rollout"):
                    found = self._forward(
                        model,
                        problems,
                        batch.for_members(count),
                        is_first=number == 0,
                        num_members=self.members_per_forward,
                        on_rows=mode.hooks.on_rows,
                    )
                if found is None:
                    return PendingChunk(accumulators, are_broken, is_short=True)
                if not is_counted:
                    continue
                for place, accumulator in enumerate(accumulators):
                    with self._timer("rollout"):
                        mine = _of_member(found, place, count)
                        accumulator.take(batch.rows, mine, is_first=number == 0)
                    are_broken[place] |= isinstance(mine, Completions) and not mine.is_finite
                    with self._timer("reward"):
                        accumulator.send(is_last=False)
        with self._timer("reward"):
            for accumulator in accumulators:
                accumulator.send(is_last=True)
        return PendingChunk(accumulators, are_broken, is_short=False)

    def finish(self, pending: Pending) -> Evaluation:
        """Waits for the scores and brings them together; a collective of the group.

        Raises:
            MemoryShortageError: As ``evaluate`` does.
        """
        with self._timer("reward"):
            totals = pending.accumulator.totals()
        flags = [float(pending.is_broken), float(pending.is_short)]
        with self._timer("io"):
            *totals, is_broken, is_short = pending.group.sum_float64([*totals, *flags])
        if is_short:
            raise MemoryShortageError
        evaluation = pending.accumulator.evaluation(totals)
        return replace(evaluation, is_finite=evaluation.is_finite and not is_broken)

    def accumulator(self, problems: PromptBatch, *, keeps_samples: bool = False) -> RewardAccumulator:
        """An evaluation of which nothing is known yet."""
        scorer = problems.scorer
        if problems.choices is not None:
            num_samples = len(problems.rows) if keeps_samples else self.micro_batch_size
            return LogLikelihoodAccumulator(
                problems.choices, metric=scorer.task.metric, num_samples=num_samples
            )
        return CompletionAccumulator(
            problems.rows,
            problems.prompts,
            samples_per_prompt=problems.samples_per_prompt,
            scorer=scorer,
            text=self._text,
            keeps_samples=keeps_samples,
        )

    def _forward(
        self,
        model: Any,
        problems: PromptBatch,
        batch: MicroBatch | LikelihoodBatch,
        *,
        is_first: bool,
        num_members: int = 1,
        on_rows: OnRows | None = None,
    ) -> Completions | list[torch.Tensor] | None:
        """What the model says; None if there was too little memory and there is a mode that takes less."""
        try:
            if isinstance(batch, LikelihoodBatch):
                if on_rows is not None:
                    on_rows(torch.arange(len(batch.rows), device=batch.input_ids.device))
                return log_likelihoods(model, batch)
            if is_first:
                prefix = problems.prefix
                if prefix is not None:
                    prefix = prefix.expand(batch.num_members, -1)
                self._decoder.begin(model, prefix, on_rows=on_rows)
            return self._decoder.decode(
                model,
                batch,
                any_rank=self._any_rank,
                num_prefills=problems.num_prefills(num_members),
                on_rows=on_rows,
            )
        except (RuntimeError, MemoryError) as error:
            if not (self._modes.can_step_down and is_shortage(error)):
                raise
            return None

    def _text(self, answer: list[int]) -> str:
        return self._stop.trim(self._tokenizer.decode(answer, skip_special_tokens=True))


def _of_member(
    found: Completions | list[torch.Tensor], place: int, count: int
) -> Completions | list[torch.Tensor]:
    """What one of ``count`` members said whose rows lie side by side."""
    if isinstance(found, Completions):
        return Completions(found.tokens[place::count], found.are_finite[place::count])
    return found[place::count]
