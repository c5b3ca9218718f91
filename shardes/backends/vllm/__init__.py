"""The backend ``vllm``: shards that are the parameters of a vLLM engine in this process."""
