"""Imports what a rank under vLLM needs; an ImportError where it is not installed."""

import os

from shardes.backends.vllm.launch import ENVIRONMENT

os.environ.update(ENVIRONMENT)

import vllm.entrypoints.llm
import vllm.model_executor.models.llama
import vllm.model_executor.models.qwen2
import vllm.v1.engine.llm_engine
import vllm.v1.worker.cpu_worker  # noqa: F401
