"""Mapping from a model's parameters to the tensors of its files.

transformers names and shapes some parameters differently from the published files: it renames tensors, and
it joins them, above all the experts of a mixture, each of which is a tensor of its own in the files but a
slice of one parameter in the model. Its own rules are applied here, to names alone. A parameter can be read
by ranges as long as its elements are those of whole tensors, one after the other; anything else is refused.
"""

import re
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from shardes.errors import UserError

_REMEDY = (
    "load the model with transformers and save it again with save_original_format=False, which stores "
    "tensors as the model has them"
)


class Conversion:
    """Conversion rules of transformers for checkpoints of one architecture.

    Args:
        model: Model of the architecture; its parameters may be on the meta device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._by_pattern = {
            pattern: converter for converter in self._converters for pattern in converter.source_patterns
        }
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()
        self._ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]

    def join(self, stored: Iterable[str]) -> dict[str, list[str]]:
        """Return the file tensors of each parameter, in the order of its elements.

        Names that fit no parameter stand for themselves, unless transformers is told to ignore them.

        Raises:
            UserError: A tensor has to be changed in a way that ranges of bytes cannot express.
        """
        from transformers.core_model_loading import dot_natural_key

        parts: dict[str, dict[str | None, list[str]]] = {}
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = self._target(name)
            if target in self._state:
                parts.setdefault(target, {}).setdefault(pattern, []).append(name)
            elif not any(ignored.search(name) for ignored in self._ignored):
                parts.setdefault(name, {}).setdefault(None, []).append(name)
        return {target: self._order(target, by_pattern) for target, by_pattern in parts.items()}

    def _target(self, name: str) -> tuple[str, str | None]:
        """Return the parameter that a file tensor belongs to, and the pattern that joins it to others."""
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._state
        )
        if target not in self._state and name in self._state:
            return name, None
        return target, pattern

    def _order(self, target: str, by_pattern: dict[str | None, list[str]]) -> list[str]:
        if None in by_pattern:
            names = [name for part in by_pattern.values() for name in part]
            if len(names) > 1:
                raise UserError(
                    f"model.path: {names[0]} and {names[1]} are both the model's {target}; remove one from "
                    "the files"
                )
            return names
        patterns = [pattern for pattern in by_pattern if pattern is not None]
        converter = self._by_pattern[patterns[0]]
        lists = [by_pattern[p] for p in converter.source_patterns if p in by_pattern]
        operations = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
        first = lists[0][0]
        if len({len(names) for names in lists}) > 1:
            raise UserError(
                f"model.path: {target} is joined from tensors like {first}, but the files hold "
                f"{' and '.join(str(len(names)) for names in lists)} of its kinds; fetch them again"
            )
        if len(converter.target_patterns) != 1 or len(lists) != len(converter.source_patterns):
            operations = []
        if operations in (
            [("MergeModulelist", 0)],
            [("Concatenate", 0)],
            [("MergeModulelist", 0), ("Concatenate", 0)],
        ):
            return [name for names in lists for name in names]
        if (
            operations == [("MergeModulelist", 0), ("Concatenate", 1)]
            and len({len(names) for names in lists}) == 1
        ):
            # Within each expert, one tensor after the other.
            return [name for expert in zip(*lists, strict=True) for name in expert]
        raise UserError(
            f"model.path: {first} of the files would have to become {target} by {_described(converter)}, "
            f"which cannot be done while each rank reads its own part only; {_REMEDY}"
        )


def _described(converter: Any) -> str:
    return f"transformers' {[type(operation).__name__ for operation in converter.operations]}"
