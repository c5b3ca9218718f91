"""Mapping from a model's parameters to the tensors of its files.

transformers names and shapes some parameters differently from the published files: it renames tensors, and
it joins them, above all the experts of a mixture, each of which is a tensor of its own in the files but a
slice of one parameter in the model. Its own rules are applied here, to names alone. A parameter can be read
by ranges as long as its elements are those of whole tensors, one after the other; anything else is refused.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from shardes.config.old_keys import warn_once
from shardes.errors import UserError
from shardes.models.checkpoint import Checkpoint, StoredTensor

_REMEDY = (
    "load the model with transformers and save it again with save_original_format=False, which stores "
    "tensors as the model has them"
)


# Buffers of older versions of models, which the constructors compute today.
_OLD_BUFFER = re.compile(
    r"(^|[._])(inv_freq|position_ids|masked_bias|causal_mask|(cos|sin)_cached|(attn|(self_)?attention)\.bias)$"
)


class Conversion:
    """Conversion rules of transformers for checkpoints of one architecture.

    Args:
        model: Model of the architecture; its parameters may be on the meta device.

    Attributes:
        aliases: Further names of tied weights, and the first name of each.
        is_untied: Whether the weights that config.json ties are different in the files, so that the model
            was built without ties; set by ``build_model``.
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
        # What ``_target`` has found: rules are regular expressions, and each name is looked up repeatedly.
        self._targets: dict[str, tuple[str, str | None]] = {}
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()
        self._modules = {name for name, _ in model.named_modules()}
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        named = list(model.named_parameters(remove_duplicate=False))
        self.aliases = {name: first[id(held)] for name, held in named if first[id(held)] != name}
        self.is_untied = False
        self._buffers = set(self._state) - {name for name, _ in named}
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        # transformers adds these by itself, see PreTrainedModel._adjust_missing_and_unexpected_keys.
        if any(name.endswith("rotary_emb.inv_freq") for name, _ in model.named_buffers()):
            ignored.add(r"rotary_emb\.inv_freq")
        self._ignored = [re.compile(pattern) for pattern in ignored]

    def apply(self, checkpoint: Checkpoint, *, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Replace a checkpoint's tensors by the model's parameters; a second call changes nothing.

        Args:
            checkpoint: The checkpoint, whose ``buffers`` become the tensors of the model's buffers.
            shapes: Shape of each parameter.

        Raises:
            UserError: The tensors do not add up to parameters.
        """
        for name in self.find_buffers(checkpoint.tensors).values():
            stored = checkpoint.tensors[name]
            assert isinstance(stored, StoredTensor), "nothing is joined yet"
            checkpoint.buffers[name] = stored
        checkpoint.join(self.join(checkpoint.tensors), shapes=shapes)

    def find_buffers(self, stored: Iterable[str]) -> dict[str, str]:
        """Return the file tensor of each of the model's buffers that the files hold."""
        targets = {self._target(name)[0]: name for name in stored}
        return {target: name for target, name in targets.items() if target in self._buffers}

    def join(self, stored: Iterable[str]) -> dict[str, list[str]]:
        """Return the file tensors of each parameter, in the order of its elements.

        A tied weight is found under whichever of its names the files have. Left out are buffers and, as in
        transformers, tensors of parts that the model does not have, which is warned of. Other names that fit
        no parameter stand for themselves.

        Raises:
            UserError: A tensor has to be changed in a way that ranges of bytes cannot express.
        """
        from transformers.core_model_loading import dot_natural_key

        parts: dict[str, dict[str | None, list[str]]] = {}
        unused: list[str] = []
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = self._target(name)
            if target in self._buffers:
                continue
            if target in self._state:
                parts.setdefault(target, {}).setdefault(pattern, []).append(name)
            elif self._is_of_another_part(target):
                unused.append(name)
            elif not self._is_ignored(name) and not self._is_ignored(target):
                parts.setdefault(name, {}).setdefault(None, []).append(name)
        if unused:
            warn_once(
                f"model.path: {len(unused)} tensors of parts that the model does not have are left out, as "
                f"transformers does: {', '.join(unused[:5])}{' ...' if len(unused) > 5 else ''}"
            )
        joined = {target: self._order(target, by_pattern) for target, by_pattern in parts.items()}
        for alias, name in self.aliases.items():
            if alias in joined and name not in joined:
                joined[name] = joined.pop(alias)
        return joined

    def _is_ignored(self, name: str) -> bool:
        """Return whether a tensor is one that transformers ignores, or a buffer that is computed today."""
        return bool(_OLD_BUFFER.search(name)) or any(ignored.search(name) for ignored in self._ignored)

    def _is_of_another_part(self, name: str) -> bool:
        """Return whether a tensor belongs to no module of the model: a value head, say, or a vision tower.

        One inside a layer, or of a layer too many, rather means that config.json is not the files' own.
        """
        return "." in name and all(
            self._owner(each) in ("", self._prefix) for each in (name, f"{self._prefix}.{name}")
        )

    def _owner(self, name: str) -> str:
        """Return the innermost module of the model that a name lies in."""
        owner = name.rpartition(".")[0]
        while owner and owner not in self._modules:
            owner = owner.rpartition(".")[0]
        return owner

    def _target(self, name: str) -> tuple[str, str | None]:
        """Return the parameter that a file tensor belongs to, and the pattern that joins it to others."""
        from transformers.core_model_loading import rename_source_key

        if name in self._targets:
            return self._targets[name]
        target, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._state
        )
        if target not in self._state and name in self._state:
            target, pattern = rename_source_key(name, [], [], self._prefix, self._state)
        self._targets[name] = target, pattern
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
        if operations == [("MergeModulelist", 0), ("Concatenate", 1)]:
            # Within each expert, one tensor after the other.
            return [name for expert in zip(*lists, strict=True) for name in expert]
        raise UserError(
            f"model.path: {first} of the files would have to become {target} by {_described(converter)}, "
            f"which cannot be done while each rank reads its own part only; {_REMEDY}"
        )


def _described(converter: Any) -> str:
    return f"transformers' {[type(operation).__name__ for operation in converter.operations]}"
