"""Members and the centre, evaluated on a batch of problems by some ranks."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardes.config.schema import RolloutConfig
from shardes.distributed.group import Group, Mesh
from shardes.environments.base import COHORTS_AT_ONCE
from shardes.environments.runners import Environments
from shardes.es.update import Perturbation
from shardes.rewards.scorer import Scorer
from shardes.rollout.aggregate import (
    BatchAccumulator,
    CompletionAccumulator,
    Evaluation,
    PartialResult,
    RewardAccumulator,
)
from shardes.rollout.batching import LikelihoodBatch, MicroBatch
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.engines.base import Completions, Engine, EngineOutput
from shardes.rollout.episode_results import EpisodeAccumulator
from shardes.rollout.episodes import EpisodePlayer, TooLittleMemoryError, model_name
from shardes.rollout.likelihood import LogLikelihoodAccumulator
from shardes.rollout.memory import MemoryShortageError, is_shortage
from shardes.rollout.prompts import PromptBatch, PromptBuilder
from shardes.rollout.sampling import make_sampler
from shardes.rollout.share import WorkShare
from shardes.rollout.stop_strings import make_stop_strings
from shardes.tasks.base import Row, Task
from shardes.utils.timers import PhaseTimer


@dataclass(frozen=True)
class InFlightBatch:
    """An evaluation of which this rank has done its part, but for the scores.

    Attributes:
        prompts: What was asked.
        accumulators: What is known so far, one for each member.
        is_finite: For each member, whether all logits were finite that this rank saw.
        is_short: Whether this rank had too little memory.
    """

    prompts: PromptBatch
    accumulators: Sequence[RewardAccumulator]
    is_finite: list[bool]
    is_short: bool

    def parts(self) -> list[PartialResult]:
        """Wait for the scores, and return what this rank knows of each member."""
        if self.is_short:
            return [PartialResult(is_short=True)]
        return [
            replace(accumulator.part(), is_finite=is_finite)
            for accumulator, is_finite in zip(self.accumulators, self.is_finite, strict=True)
        ]


class Evaluator:
    """Has an engine answer problems, and the answers scored.

    Args:
        engine: Answers.
        tokenizer: The model's tokenizer.
        mesh: The ranks.
        scorer: Has answers scored; its task is the one that is trained on.
        environments: Run the episodes of all tasks; None: no task has any.
        settings: How prompts are answered.
        seed: The key of the random numbers that draw answers.
        max_positions: Tokens of a prompt and its answer that the model was made for; None: any number.
        timer: Where the time goes.
        encoder: Makes tokens of prompts.
        pad_id: Token id that fills rows.
        end_ids: Tokens that end an answer and are no part of its text.

    Attributes:
        engine: Answers.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        tokenizer: Any,
        mesh: Mesh,
        scorer: Scorer,
        environments: Environments | None = None,
        settings: RolloutConfig,
        seed: int,
        max_positions: int | None,
        timer: PhaseTimer,
        encoder: PromptEncoder,
        pad_id: int,
        end_ids: Collection[int],
    ) -> None:
        self.engine = engine
        self._parts = {"tokenizer": tokenizer, "mesh": mesh, "scorer": scorer, "seed": seed, "timer": timer}
        self._parts |= {"max_positions": max_positions, "encoder": encoder, "pad_id": pad_id}
        self._parts |= {"end_ids": end_ids, "environments": environments}
        # Special tokens that are left out anyway may end an answer, too.
        self._end_ids = frozenset(() if settings.skip_special_tokens else end_ids)
        self._mesh, self._settings, self._timer = mesh, settings, timer
        self._stop = make_stop_strings(settings, tokenizer)
        self._builder = PromptBuilder(
            encoder,
            pad_id=pad_id,
            scorer=scorer,
            settings=settings,
            seed=seed,
            device=mesh.world.device,
            max_positions=max_positions,
            text=self._text,
        )
        self._environments, self._counted = environments, (0, 0)
        self._episodes = EpisodePlayer(
            engine,
            encoder=encoder,
            mesh=mesh,
            settings=settings,
            sampler=make_sampler(settings, seed=seed),
            text=self._text,
            pad_id=pad_id,
            end_ids=frozenset(end_ids),
            timer=timer,
        )

    def sampled(self) -> "Evaluator":
        """Return an evaluator over the same weights that draws one answer a prompt, at temperature 1."""
        return self.changed(temperature=1.0, top_k=None, top_p=1.0, samples_per_prompt=1)

    def changed(self, **changes: Any) -> "Evaluator":
        """Return an evaluator over the same weights that draws answers otherwise.

        Args:
            changes: Keys of the section ``rollout`` that say how answers are drawn.
        """
        settings = self._settings.model_copy(update=changes)
        return Evaluator(self.engine.with_settings(settings), settings=settings, **self._parts)

    @property
    def micro_batch_size(self) -> int:
        """Return the prompts per forward; a number once it is known what ``auto`` is."""
        size = self._settings.micro_batch_size
        assert isinstance(size, int), "what auto is must be found first"
        return size

    @micro_batch_size.setter
    def micro_batch_size(self, size: int) -> None:
        self._settings = self._settings.model_copy(update={"micro_batch_size": size})

    @property
    def samples_per_prompt(self) -> int:
        """Return the number of answers to each prompt."""
        return self._settings.samples_per_prompt

    def take_episode_counts(self) -> dict[str, Any]:
        """Return what was counted of this rank's episodes since the last call, by name, and begin anew."""
        prefilled = self.engine.num_prefilled_tokens
        kills = 0 if self._environments is None else self._environments.num_kills
        before, self._counted = self._counted, (prefilled, kills)
        found = vars(self._episodes.counts) | {
            "num_prefilled_tokens": prefilled - before[0],
            "num_environment_kills": kills - before[1],
        }
        self._episodes.counts.reset()
        return {**found, "environment_seconds": round(found["environment_seconds"], 6)}

    def prepare(self, rows: Sequence[Row], *, iteration: int, scorer: Scorer | None = None) -> PromptBatch:
        """Render, tokenise and cut a batch of problems; see ``PromptBuilder.build``."""
        return self._builder.build(
            rows, iteration=iteration, micro_batch_size=self.micro_batch_size, scorer=scorer
        )

    def prepare_pairs(self, pairs: Sequence[Sequence[list[int]]], *, scorer: Scorer) -> PromptBatch:
        """Cut a batch that asks for the likelihood of given tokens; see ``PromptBuilder.build_pairs``."""
        return self._builder.build_pairs(pairs, scorer=scorer, micro_batch_size=self.micro_batch_size)

    def tokens_of(self, task: Task) -> list[list[int]]:
        """Return the tokens of a task's prompts."""
        return self._builder.tokens_of(task)

    def begin(self, prompts: PromptBatch) -> None:
        """Make members of the current centre loadable, to answer these prompts; a collective of all ranks."""
        if (plan := prompts.episodes) is not None:
            size = max(map(len, plan.cohorts), default=1)
            self.engine.expect_cohorts(COHORTS_AT_ONCE, size=size, max_context=plan.max_context)
        self.engine.begin(max(map(self.engine.bytes_for, prompts.micro_batches), default=0))

    def fits(self, prompts: PromptBatch) -> bool:
        """Return whether this rank has the memory for the longest micro-batch; a collective of a group."""
        return self.engine.fits(prompts.micro_batches[-1], prompts=prompts)

    def share_of(self, group: Group) -> WorkShare:
        """Return this rank's share where the ranks of a group answer for the same members."""
        together, shard = self.engine.ranks_per_forward, self._mesh.shard
        place = group.rank // together
        # Where forwards are collectives, ranks of a replica go on for as long as its first has a micro-batch.
        leader = (group.rank - shard.rank) // together if self.engine.forward_is_collective else place
        return WorkShare(place, group.world_size // together, leader, together == 1 or shard.is_main)

    def evaluate_centre(
        self, prompts: PromptBatch, *, group: Group, keeps_samples: bool = False
    ) -> Evaluation:
        """Evaluate the centre; a collective of the ranks that share the micro-batches.

        Args:
            prompts: What it is asked.
            group: These ranks.
            keeps_samples: Whether every answer is kept, on the rank that gave it.

        Raises:
            MemoryShortageError: On every rank of the group, if one had too little memory, and if there is a
                way to go on that takes less.
        """
        self.engine.load_centre()
        in_flight = self.answer(
            prompts, num_members=1, share=self.share_of(group), keeps_samples=keeps_samples
        )
        return self.collect(in_flight, group=group)[0][0]

    def start(
        self, prompts: PromptBatch, members: Sequence[Perturbation], *, share: WorkShare
    ) -> InFlightBatch:
        """Have members answer, without waiting for scores; a collective of a group where forwards are.

        The weights may change afterwards. Evaluations are collected in the order in which they were started.

        Args:
            prompts: What all of them are asked.
            members: As many as share forwards.
            share: This rank's share of the micro-batches.
        """
        self.engine.load(members)
        return self.answer(prompts, num_members=len(members), share=share, model=model_name(members[0]))

    def answer(
        self,
        prompts: PromptBatch,
        *,
        num_members: int,
        share: WorkShare,
        model: str = model_name(None),
        keeps_samples: bool = False,
    ) -> InFlightBatch:
        """Have what is loaded answer this rank's micro-batches; arguments as in ``start``.

        ``model`` is the name by which a harness asks for it.
        """
        if prompts.episodes is not None:
            assert num_members == 1, "episodes of members that share forwards are refused"
            return self._play(prompts, share=share, model=model, keeps_samples=keeps_samples)
        accumulators = [
            self._batch_accumulator(prompts, keeps_samples=keeps_samples) for _ in range(num_members)
        ]
        are_finite = [True] * num_members
        batches = prompts.micro_batches
        self.engine.expect(batches[share.place :: share.num_places])
        for first in range(0, len(batches), share.num_places):
            if first + share.leader >= len(batches):
                break
            mine = first + share.place
            # A rank without a micro-batch of its own repeats another's, so that all call alike.
            is_idle = mine >= len(batches)
            batch = batches[first + share.leader if is_idle else mine]
            with self._timer("rollout"):
                output = self._forward(batch, prompts)
            if output is None:
                return InFlightBatch(prompts, accumulators, are_finite, is_short=True)
            for i, accumulator in enumerate(accumulators):
                own = _of_member(output, i, num_members)
                are_finite[i] &= not isinstance(own, Completions) or own.is_finite
                if share.is_counted and not is_idle:
                    with self._timer("rollout"):
                        accumulator.take(batch.rows, own, is_first=mine == 0)
                    with self._timer("reward"):
                        accumulator.send(is_last=False)
        with self._timer("reward"):
            for accumulator in accumulators:
                accumulator.send(is_last=True)
        return InFlightBatch(prompts, accumulators, are_finite, is_short=False)

    def _play(
        self, prompts: PromptBatch, *, share: WorkShare, model: str, keeps_samples: bool
    ) -> InFlightBatch:
        """Play this rank's share of episodes with what is loaded."""
        accumulator = EpisodeAccumulator(prompts, keeps_samples=keeps_samples)

        def generate(batch: MicroBatch, prompts: PromptBatch) -> Completions | None:
            with self._timer("reward"):  # of cohorts that are over, while others go on
                accumulator.send(is_last=False)
            with self._timer("rollout"):
                output = self._forward(batch, prompts)
            assert output is None or isinstance(output, Completions)
            return output

        try:
            is_finite = self._episodes.play(
                prompts,
                share=share,
                model=model,
                take=accumulator.take,
                generate=generate,
            )
        except TooLittleMemoryError:
            return InFlightBatch(prompts, [accumulator], [True], is_short=True)
        with self._timer("reward"):
            accumulator.send(is_last=True)
        return InFlightBatch(prompts, [accumulator], [is_finite], is_short=False)

    def collect(
        self,
        in_flight: InFlightBatch,
        *,
        group: Group,
        slot: int = 0,
        sizes: Sequence[int] = (1,),
    ) -> list[list[Evaluation]]:
        """Wait for the scores and bring them together; a collective of the group.

        Args:
            in_flight: What this rank has started.
            group: The ranks that have parts.
            slot: Which of the group's loads this rank's is; beyond the last: another rank's as well.
            sizes: Members of each load.

        Returns:
            For each load, the evaluations of its members.

        Raises:
            MemoryShortageError: As ``evaluate_centre`` does.
        """
        with self._timer("reward"):
            own = in_flight.parts()
        of_ranks = [(slot, own)]
        with self._timer("io"):
            if group.world_size > 1:
                found = group.gather_json([slot, [part.to_json() for part in own]])
                of_ranks = [(at, [PartialResult.from_json(part) for part in parts]) for at, parts in found]
        if any(part.is_short for _, parts in of_ranks for part in parts):
            raise MemoryShortageError
        evaluations = []
        for load, size in enumerate(sizes):
            is_own = load == slot
            accumulators = in_flight.accumulators if is_own else [self.accumulator(in_flight.prompts)] * size
            of_load = [parts for at, parts in of_ranks if at == load]
            evaluations.append(
                [each.merge([parts[i] for parts in of_load]) for i, each in enumerate(accumulators)]
            )
        return evaluations

    def accumulator(self, prompts: PromptBatch) -> RewardAccumulator:
        """Return an accumulator that knows nothing yet."""
        if prompts.episodes is not None:
            return EpisodeAccumulator(prompts, keeps_samples=False)
        return self._batch_accumulator(prompts, keeps_samples=False)

    def _batch_accumulator(self, prompts: PromptBatch, *, keeps_samples: bool) -> BatchAccumulator:
        scorer = prompts.scorer
        if prompts.choices is not None:
            num_samples = len(prompts.rows) if keeps_samples else self.micro_batch_size
            return LogLikelihoodAccumulator(
                prompts.choices, metric=scorer.task.metric, num_samples=num_samples
            )
        return CompletionAccumulator(
            prompts.rows,
            prompts.prompts,
            samples_per_prompt=prompts.samples_per_prompt,
            scorer=scorer,
            text=self._text,
            opened=prompts.opened,
            keeps_samples=keeps_samples,
        )

    def _forward(self, batch: MicroBatch | LikelihoodBatch, prompts: PromptBatch) -> EngineOutput | None:
        """Return the engine's output; None if there was too little memory and there is a way to take less."""
        try:
            if isinstance(batch, LikelihoodBatch):
                return self.engine.log_likelihood(batch)
            return self.engine.generate(batch, prompts=prompts)
        except (RuntimeError, MemoryError) as error:
            if not (self.engine.can_step_down and is_shortage(error)):
                raise
            return None

    def _text(self, tokens: list[int]) -> str:
        if tokens and tokens[-1] in self._end_ids:
            tokens = tokens[:-1]
        return self._stop.trim(self._stop.decode(tokens))


def _of_member(output: EngineOutput, index: int, num_members: int) -> EngineOutput:
    """Return one member's rows of those of members that lie side by side."""
    if isinstance(output, Completions):
        return Completions(output.tokens[index::num_members], output.are_finite[index::num_members])
    return output[index::num_members]
