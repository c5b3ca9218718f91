"""Checks that take GPUs: parts that run one after the other, each a process with a time limit of its own.

docs/gpu_check.md describes the parts and the keys of the report.
"""
