"""Names of the engines, light enough for the configuration; ``rollout/build.py`` makes one."""

ENGINES = {"transformers": "shardes.rollout.engines.transformers.engine:TransformersEngine"}
"""The class of each engine, as ``module:class``, by the name that ``rollout.engine`` gives it."""
