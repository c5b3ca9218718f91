"""The paper's claims, measured: shardes and TRL's GRPO on the same models, prompts, rewards and answers.

``python -m tools.claims run`` makes the lines of benchmarks/claims.jsonl, ``python -m tools.claims table`` the
page benchmarks/claims.md of them, and ``python -m tools.claims.grpo`` trains once with GRPO.
"""
