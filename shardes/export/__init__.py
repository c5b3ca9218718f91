"""Consolidated Hugging Face directories."""
