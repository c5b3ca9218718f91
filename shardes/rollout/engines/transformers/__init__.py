"""The engine `transformers`: decoding with a transformers model in this process."""
