"""Evaluators over the engine ``transformers``, made by hand, and what they find."""

from shardes.config.schema import RolloutConfig
from shardes.models.build import load_tokenizer
from shardes.rewards.pool import InProcessRewards
from shardes.rewards.scorer import Scorer
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.engines.transformers.engine import TransformersEngine
from shardes.rollout.evaluator import Evaluator


def make_evaluator_of(session, task, *, mesh=None, **settings):
    """An evaluator of a task's problems with rewards in this process."""
    common = {
        "tokenizer": load_tokenizer(session.config.model.path, trust_remote_code=False),
        "mesh": mesh or session.mesh,
        "settings": RolloutConfig(**settings),
        "seed": 0,
        "timer": session.timer,
    }
    engine = TransformersEngine(backend=session.backend, weights=session.weights, **common)
    scorer = Scorer(task, rewards=InProcessRewards(list(task.rewards)), on_error="exclude")
    tokenizer = common["tokenizer"]
    return Evaluator(
        engine,
        scorer=scorer,
        max_positions=None,
        encoder=PromptEncoder(tokenizer, max_positions=None),
        pad_id=tokenizer.pad_token_id,
        end_ids=(),
        **common,
    )


def start_member(evaluator, prompts, member, *, group):
    """Has a member answer."""
    return evaluator.start(prompts, [member], share=evaluator.share_of(group))


def evaluate_member(evaluator, prompts, member, *, group):
    """What a member earns."""
    return evaluator.collect(start_member(evaluator, prompts, member, group=group), group=group)[0][0]
