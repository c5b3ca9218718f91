"""The paper's claims, measured: shardes and TRL's GRPO on the same models, prompts and rewards.

``python tools/claims run`` makes the lines of benchmarks/claims.jsonl, ``python tools/claims table`` the page
benchmarks/claims.md of them, and ``python tools/claims grpo`` trains a configuration once with GRPO.
"""
