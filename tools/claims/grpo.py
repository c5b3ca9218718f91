"""Train one of shardes's configurations with the GRPOTrainer of TRL, in one process with one thread.

The model, the training rows, the tokens of their prompts, the length of answers and the rewards are those of
the configuration; the section ``es`` gives the schedule of the step size and the seed, ``task.batch_size`` is
not used. What is trained and how is TRL's own, with its defaults but for the options below. Checkpoints are
Hugging Face directories, which ``shardes compare`` reads.

    python tools/claims grpo --config configs/quickstart.yaml --out runs/grpo --completions 40960

It wants the extra ``study``.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from claims.judging import make_judge
from claims.settings import GRPOSettings
from claims.training import Clock, Place, Trained, current_bytes, due_steps, peak_bytes
from shardes.errors import UserError

if TYPE_CHECKING:
    from shardes.config.schema import Config


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


def answer_likelihoods(
    model: Any, ids: Any, mask: Any, *, num_tokens: int, temperature: float
) -> tuple[Any, Any]:
    """Return the log-likelihood of each token of answers, and the entropy of what it was drawn from.

    Args:
        model: Causal language model.
        ids: Prompts, padded on the left, with answers, padded on the right; (answers, tokens).
        mask: 1 where there is a token, of the same shape.
        num_tokens: Length of the answers with their padding.
        temperature: Temperature of the distribution.

    Returns:
        Both in nats, (answers, ``num_tokens``), float32; the entropy has no gradient.
    """
    import torch

    output = model(input_ids=ids, attention_mask=mask, logits_to_keep=num_tokens + 1, use_cache=False)
    log_likelihoods = (output.logits[:, :-1].float() / temperature).log_softmax(-1)
    with torch.no_grad():
        entropies = -(log_likelihoods.exp() * log_likelihoods).sum(-1)
    chosen = ids[:, -num_tokens:].unsqueeze(-1)
    return log_likelihoods.gather(-1, chosen).squeeze(-1), entropies


def _trainer_class() -> Any:
    import torch

    try:
        from trl import GRPOTrainer
    except ImportError as error:
        raise UserError(f"TRL cannot be imported ({error}); install the extra: shardes[study]") from None

    class SamePrompts(GRPOTrainer):
        """The trainer, asking the tokens that shardes asks, and computing logits of answers alone."""

        judge: Any = None

        def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
            return self.judge.prompt_ids(prompts), None, {}

        def _get_per_token_logps_and_entropies(
            self,
            model: Any,
            input_ids: Any,
            attention_mask: Any,
            logits_to_keep: int,
            batch_size: int | None = None,
            **_: Any,
        ) -> tuple[Any, Any, None]:
            # Where there is no Triton, TRL computes the logits of prompts too, in float32, of which it uses
            # none. On a processor that is half of an update's time.
            size = batch_size or len(input_ids)
            found = [
                answer_likelihoods(model, ids, mask, num_tokens=logits_to_keep, temperature=self.temperature)
                for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True)
            ]
            log_likelihoods, entropies = zip(*found, strict=True)
            return torch.cat(log_likelihoods), torch.cat(entropies), None

    return SamePrompts


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
        lr_scheduler_type=config.es.alpha_schedule,  # transformers has the same names
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

    settings = GRPOSettings(**options)
    if out.exists() and any(out.iterdir()):
        raise click.UsageError(f"--out: {out} is not empty; give another directory")
    try:
        config = one_process(config_path, overrides)
        trained = train_grpo(
            config, settings, out=out, num_completions=completions, num_evaluations=evaluations
        )
        curve = measure(config, trained, kl_prompts=kl_prompts)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
    for point in curve:
        click.echo(json.dumps(point))
    result = {"settings": vars(settings), "curve": curve, "peak_bytes": trained.peak_bytes}
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
