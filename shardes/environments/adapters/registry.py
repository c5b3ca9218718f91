"""Names of the adapters, and where each is; imports nothing."""

HARNESSES: dict[str, str] = {"verifiers": "shardes.environments.adapters.verifiers:play"}
"""Adapters that ask the model by themselves, through the endpoint, as ``task.harness`` does.

The name that follows in ``task.environment`` is the function's argument ``name``.
"""

ADAPTERS: dict[str, str] = {
    "gymnasium": "shardes.environments.adapters.gymnasium:make",
    "openenv": "shardes.environments.adapters.openenv:make",
    "reasoning_gym": "shardes.environments.adapters.reasoning_gym:make",
    "textarena": "shardes.environments.adapters.textarena:make",
}
"""Function of each adapter by name, as ``module:function``.

A function takes what follows the adapter's name in ``task.environment`` and ``task.environment_arguments``,
and returns a callable that makes the environment of one episode. It raises ValueError, with one message,
for a package that is missing, a name that the package does not know and arguments that it does not take.
"""
