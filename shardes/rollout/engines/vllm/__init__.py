"""The engine ``vllm``: vLLM answers with its own weights, which the backend ``vllm`` writes members into."""
