"""Evolution strategies fine-tuning for language models whose parameters are sharded over many devices."""

__version__ = "0.1.0"
