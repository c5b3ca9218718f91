"""Engines: what generates completions and scores them."""
