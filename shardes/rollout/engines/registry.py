"""Names of the engines, light enough for the configuration; ``rollout/build.py`` makes one."""

ENGINES = {
    "transformers": "shardes.rollout.engines.transformers.engine:TransformersEngine",
    "vllm": "shardes.rollout.engines.vllm.engine:VllmEngine",
}
"""The class of each engine, as ``module:class``, by the name that ``rollout.engine`` gives it."""

DEFAULT_ENGINE = "transformers"
"""The engine of backends that have none of their own."""
