"""Train one of shardes's configurations with the GRPOTrainer of TRL, in one process with one thread.

The model, the training rows, the tokens of their prompts, the length of answers and the rewards are those of
the configuration; the section ``es`` gives the schedule of the step size and the seed, ``task.batch_size`` is
not used. What is trained and how is TRL's own, with its defaults but for the options below. Checkpoints are
Hugging Face directories, which ``shardes compare`` reads.

    python -m tools.claims.grpo --config configs/quickstart.yaml --out runs/grpo --completions 40960

It wants the extra ``study``.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from claims.training import Clock, Place, Trained, current_bytes, due_steps, peak_bytes
from shardes.errors import UserError

if TYPE_CHECKING:
    from shardes.config.schema import Config
    from shardes.rewards.scorer import Scorer
    from shardes.rollout.encoding import PromptEncoder
    from shardes.tasks.base import Task

# Schedules of es.alpha by the name that transformers has for them.
SCHEDULES = {"constant": "constant", "linear": "linear", "cosine": "cosine"}


@dataclass(frozen=True)
class GRPOSettings:
    """Options of GRPO that a configuration of shardes does not have.

    Attributes:
        learning_rate: Step size of AdamW.
        num_generations: Answers to a prompt that are compared with each other.
        prompts_per_step: Prompts of an update.
        beta: Weight of the divergence from the base model in the loss.
        micro_batch_size: Answers of a backward pass.
        bfloat16: Whether forward and backward passes are computed in bfloat16; weights stay in float32.
        bundle: Number of prompts whose answers are judged together: each gets the mean of their rewards.
    """

    learning_rate: float
    num_generations: int = 8
    prompts_per_step: int = 16
    beta: float = 0.0
    micro_batch_size: int = 128
    bfloat16: bool = False
    bundle: int = 1

    @property
    def completions_per_step(self) -> int:
        """Return the number of answers of an update."""
        return self.num_generations * self.prompts_per_step

    def check(self, num_rows: int, *, num_completions: int) -> None:
        """Refuse settings that do not go with each other or with the data.

        Args:
            num_rows: Number of training rows.
            num_completions: Number of answers that may be generated.

        Raises:
            UserError: They do not.
        """
        if self.prompts_per_step > num_rows:
            raise UserError(
                f"--prompts-per-step: got {self.prompts_per_step}, but there are {num_rows} training rows; "
                "give at most as many"
            )
        if self.prompts_per_step % self.bundle:
            raise UserError(
                f"--bundle: got {self.bundle}, which does not divide --prompts-per-step "
                f"{self.prompts_per_step}; give a number that does"
            )
        if num_completions < self.completions_per_step:
            raise UserError(
                f"--completions: got {num_completions}, but an update alone takes "
                f"{self.completions_per_step}; give more"
            )

    @property
    def backward_size(self) -> int:
        """Return the answers of a backward pass: the most that divide those of an update."""
        most = min(self.micro_batch_size, self.completions_per_step)
        return next(size for size in range(most, 0, -1) if self.completions_per_step % size == 0)


def bundled(rewards: Sequence[float], *, num_generations: int, bundle: int) -> list[float]:
    """Return rewards as they are when they come at the end of several answers only.

    The k-th answers to ``bundle`` prompts that follow each other are one episode, which earns the mean of
    their rewards: every answer of it is credited with that.

    Args:
        rewards: One for each answer; those to one prompt are side by side.
        num_generations: Number of answers to each prompt.
        bundle: Number of prompts of an episode; it divides the number of prompts.
    """
    found = list(rewards)
    span = num_generations * bundle
    for first in range(0, len(rewards), span):
        for k in range(num_generations):
            places = range(first + k, first + span, num_generations)
            mean = sum(rewards[place] for place in places) / bundle
            for place in places:
                found[place] = mean
    return found


class Judge:
    """Reward function for TRL: the rewards of a task of shardes, and a count of what was generated.

    Prompts are numbers of training rows, as texts.

    Args:
        task: The task.
        scorer: Scorer of its answers.
        encoder: Encoder of its prompts.
        text: Function that turns the tokens of an answer into text.
        end_ids: Tokens that end an answer.
        on_error: Value of ``task.on_reward_error``.
        settings: Options of GRPO.

    Attributes:
        end_ids: Tokens that end an answer.
        num_completions: Number of answers judged so far.
        num_tokens: Number of their tokens.
    """

    __name__ = "reward"  # TRL names metrics by it

    def __init__(
        self,
        task: "Task",
        scorer: "Scorer",
        encoder: "PromptEncoder",
        *,
        text: Callable[[list[int]], str],
        end_ids: Sequence[int],
        on_error: str | float,
        settings: GRPOSettings,
    ) -> None:
        self._task, self._scorer, self._encoder = task, scorer, encoder
        self._text, self._on_error, self._settings = text, on_error, settings
        self.end_ids = list(end_ids)
        self.num_completions = self.num_tokens = 0

    @property
    def num_rows(self) -> int:
        """Return the number of training rows."""
        return len(self._task.train)

    @property
    def tokenizer(self) -> Any:
        """Return the model's tokenizer."""
        return self._encoder.tokenizer

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of prompts, which are those that shardes asks."""
        return [list(self._question(prompt).prompts[0]) for prompt in prompts]

    def __call__(
        self, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float | None]:
        """Return the reward of each answer; None: it does not count."""
        from shardes.es.member import apply_reward_error_policy
        from shardes.rewards.batch import RewardBatch

        rows = [self._task.train[int(prompt)] for prompt in prompts]
        tokens = [list(ids) for ids in completion_ids]
        texts = [
            self._question(prompt).opened + self._text(ids)
            for prompt, ids in zip(prompts, tokens, strict=True)
        ]
        asked = [self._task.make_prompt(row) for row in rows]
        (pending,) = self._scorer.submit([RewardBatch.of(rows, asked, texts, tokens)])
        output = self._scorer.collect(pending)
        self.num_completions += len(tokens)
        self.num_tokens += sum(map(len, tokens))
        found = apply_reward_error_policy(output.values, output.has_failed, on_error=self._on_error)
        bundle = self._settings.bundle
        if bundle == 1:
            return found
        known = [0.0 if value is None else value for value in found]
        return [*bundled(known, num_generations=self._settings.num_generations, bundle=bundle)]

    def _question(self, prompt: str) -> Any:
        from shardes.rollout.encoding import Question

        return self._encoder.encode(Question.of(self._task, self._task.train[int(prompt)]))


def train_grpo(
    config: "Config",
    settings: GRPOSettings,
    *,
    out: Path,
    num_completions: int,
    num_evaluations: int,
) -> Trained:
    """Train a configuration's model with GRPO.

    Args:
        config: Configuration of shardes; ``es.seed`` seeds GRPO.
        settings: Options of GRPO.
        out: Directory of the checkpoints, ``step-00010`` and so on.
        num_completions: Number of answers to generate, rounded down to whole updates.
        num_evaluations: Number of checkpoints.

    Raises:
        UserError: The configuration cannot be trained with GRPO.
    """
    import torch
    import transformers
    from datasets import Dataset

    from shardes.models.checkpoint import Checkpoint

    trainer_class = _trainer_class()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    imported = current_bytes()
    clock = Clock()
    judge = make_judge(config, settings)
    settings.check(judge.num_rows, num_completions=num_completions)
    num_steps = num_completions // settings.completions_per_step
    trainer = trainer_class(
        model=str(config.model.path),
        reward_funcs=judge,
        args=grpo_arguments(config, settings, out=out, num_steps=num_steps, end_ids=judge.end_ids),
        train_dataset=Dataset.from_dict({"prompt": [str(row) for row in range(judge.num_rows)]}),
        processing_class=judge.tokenizer,
    )
    trainer.judge = judge
    trainer.eos_token_ids = judge.end_ids
    trainer.remove_callback(transformers.PrinterCallback)
    places: list[Place] = []
    due = set(due_steps(num_steps, num_evaluations))

    class Saver(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = state.global_step
            if step in due:
                counts = judge.num_completions, judge.num_tokens
                places.append(Place(step, *counts, core_seconds=clock.seconds))
                with clock.paused():
                    save_checkpoint(trainer.model, config.model.path, out / f"step-{step:05d}")

    trainer.add_callback(Saver())
    trainer.train()
    peak = peak_bytes()

    def restore(session: Any, place: Place) -> None:
        session.weights.load(Checkpoint(out / f"step-{place.step:05d}"))

    return Trained(places, restore, peak_bytes=peak, imported_bytes=imported)


def save_checkpoint(model: Any, base: Path, out: Path) -> None:
    """Write a model's weights, with everything else as it is in the base model's directory."""
    model.save_pretrained(out)
    for file in base.iterdir():
        if file.is_file() and "safetensors" not in file.name and file.suffix not in (".bin", ".pt", ".gguf"):
            shutil.copy(file, out / file.name)


def _trainer_class() -> Any:
    try:
        from trl import GRPOTrainer
    except ImportError as error:
        raise UserError(f"TRL cannot be imported ({error}); install the extra: shardes[study]") from None

    class SamePrompts(GRPOTrainer):
        """The trainer, asking the tokens that shardes asks."""

        judge: Any = None

        def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
            return self.judge.prompt_ids(prompts), None, {}

    return SamePrompts


def make_judge(config: "Config", settings: GRPOSettings) -> Judge:
    """Load a configuration's task, and return the reward function of it.

    Raises:
        UserError: The task cannot be used, or is none that GRPO is trained on here.
    """
    from transformers import AutoConfig

    from shardes.models.build import load_generation_config
    from shardes.rewards.pool import InProcessRewards
    from shardes.rewards.scorer import Scorer
    from shardes.rollout.preparing import prepare_tasks
    from shardes.rollout.stop_strings import make_stop_strings
    from shardes.tasks.loading import load_tasks

    task, sets = load_tasks(config)
    if task.choices is not None or task.episodes is not None:
        raise UserError("task: this script trains on tasks whose prompts are answered once; give another")
    if config.rollout.stop:
        raise UserError(f"rollout.stop: got {config.rollout.stop}, which this script does not do; remove it")
    prepared = prepare_tasks(config, task, sets)
    task, encoder = prepared.task, prepared.encoder
    tokenizer = encoder.tokenizer
    ends = load_generation_config(
        config.model.path, AutoConfig.from_pretrained(config.model.path)
    ).eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    end_ids = [ends] if isinstance(ends, int) else list(ends or [])
    hidden = frozenset(() if config.rollout.skip_special_tokens else end_ids)
    stop = make_stop_strings(config.rollout, tokenizer)

    def text(tokens: list[int]) -> str:
        return stop.decode(tokens[:-1] if tokens and tokens[-1] in hidden else tokens)

    on_error = config.task.on_reward_error
    scorer = Scorer(task, rewards=InProcessRewards(task.rewards), on_error=on_error)
    return Judge(task, scorer, encoder, text=text, end_ids=end_ids, on_error=on_error, settings=settings)


def grpo_arguments(
    config: "Config", settings: GRPOSettings, *, out: Path, num_steps: int, end_ids: Sequence[int]
) -> Any:
    """Return TRL's configuration for one of shardes.

    Args:
        config: Configuration of shardes.
        settings: Options of GRPO.
        out: Directory that TRL may write to.
        num_steps: Number of updates.
        end_ids: Tokens that end an answer.
    """
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(out),
        seed=config.es.seed,
        max_steps=num_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[config.es.alpha_schedule],
        warmup_steps=0,
        per_device_train_batch_size=settings.backward_size,
        gradient_accumulation_steps=settings.completions_per_step // settings.backward_size,
        num_generations=settings.num_generations,
        max_completion_length=config.rollout.max_new_tokens,
        temperature=1.0,
        beta=settings.beta,
        generation_kwargs={"eos_token_id": list(end_ids)},
        bf16=settings.bfloat16,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
    )


@click.command(help=__doc__, context_settings={"ignore_unknown_options": True, "show_default": True})
@click.option("--config", "config_path", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Checkpoints and result.json.")
@click.option("--completions", type=int, required=True, help="Answers to generate.")
@click.option("--evaluations", default=10, help="Checkpoints, whose held-out reward is measured.")
@click.option("--learning-rate", default=1e-3)
@click.option("--num-generations", default=8, help="Answers to a prompt, compared with each other.")
@click.option("--prompts-per-step", default=16, help="Prompts of an update.")
@click.option("--beta", default=0.0, help="Weight of the divergence from the base model.")
@click.option("--bundle", default=1, help="Answers whose reward comes at their end.")
@click.option("--bfloat16", is_flag=True, help="Compute in bfloat16; weights stay in float32.")
@click.option("--kl-prompts", default=64, help="Held-out problems on whose answers KL is estimated; 0: none.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")
def main(
    config_path: Path,
    out: Path,
    completions: int,
    evaluations: int,
    kl_prompts: int,
    overrides: tuple[str, ...],
    **options: Any,
) -> None:
    """Train once, and print a line for each checkpoint."""
    from claims.measuring import measure, one_process

    config = one_process(config_path, overrides)
    settings = GRPOSettings(**options)
    if out.exists() and any(out.iterdir()):
        raise click.UsageError(f"--out: {out} is not empty; give another directory")
    try:
        trained = train_grpo(
            config, settings, out=out, num_completions=completions, num_evaluations=evaluations
        )
        curve = measure(config, trained, kl_prompts=kl_prompts)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    for point in curve:
        click.echo(json.dumps(point))
    result = {"settings": vars(settings), "curve": curve, "peak_bytes": trained.peak_bytes}
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
