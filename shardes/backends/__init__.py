"""Backends: the ways to spread a model over ranks.

Nothing is imported here, so that ``registry``, which the configuration reads, costs nothing.
"""
