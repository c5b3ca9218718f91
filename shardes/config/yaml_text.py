"""YAML as configurations are written in it: no key twice, decimal numbers, no dates, of bounded size.

YAML 1.1, which PyYAML reads, takes 010 for 8, 1:30 for 90, 2024-01-31 for a date, 1e-3 for a text, and fails
for a plain =. Here the first is 10, 1e-3 is a number, and the others are texts.
"""

import re
from typing import Any

import yaml

from shardes.utils.messages import one_line

MAX_BYTES = 1 << 17
_MAX_DEPTH = 50
# Values of a file once every alias is replaced by what it stands for.
_MAX_VALUES = 100_000


class YamlError(ValueError):
    """A text is not YAML that a configuration can be; the message says why, on one line."""


class _Loader(yaml.SafeLoader):
    """A loader without the surprises of YAML 1.1."""

    flow_level: int
    indents: list[int]

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # noqa: N803 - PyYAML's name
        """Refuse what is too deep at once: PyYAML looks far ahead."""
        if self.flow_level >= _MAX_DEPTH:
            raise YamlError("it is nested too deeply")
        super().fetch_flow_collection_start(TokenClass)

    def add_indent(self, column: int) -> bool:
        """Refuse what is too deep at once."""
        if len(self.indents) >= _MAX_DEPTH:
            raise YamlError("it is nested too deeply")
        added: bool = super().add_indent(column)
        return added


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_LEFT_OUT = (_INT, _FLOAT, "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _LEFT_OUT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(0[0-7_]*|[1-9][0-9_]*)\Z"), list("-+0123456789"))
_FLOATS = re.compile(
    r"([-+]?(([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"
)
_Loader.add_implicit_resolver(_FLOAT, _FLOATS, list("-+0123456789."))
# JSON has none of what these tags make, so that a run could not write it down.
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or not tag.endswith((":timestamp", ":binary", ":set", ":omap", ":pairs"))
}


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))


_Loader.add_constructor(_INT, _decimal)


class _TextLoader(_Loader):
    """A loader for which all values are texts, but for lists and mappings."""

    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """A dumper that puts quotes around texts that YAML 1.1 or the loader here would take for numbers."""


_Dumper.add_implicit_resolver(_FLOAT, _FLOATS, list("-+0123456789."))


def dump_yaml(tree: Any) -> str:
    """Return a tree as YAML, in the order that it has; ``parse_yaml`` reads the same tree from it."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False)
    return text


def parse_yaml(text: str, *, may_have_comments: bool = True, has_texts: bool = False) -> Any:
    """Return what a text holds.

    Args:
        text: The text.
        may_have_comments: Whether a comment may follow the value.
        has_texts: Whether what looks like a number, a truth value or null is a text all the same.

    Raises:
        YamlError: It is not YAML, has a key twice, or is too large or too deep, aliases counted.
    """
    try:
        loader = (_TextLoader if has_texts else _Loader)(text)
    except yaml.YAMLError as error:  # a character that YAML does not have
        raise YamlError(one_line(error, most=None)) from None
    try:
        node = loader.get_single_node()
        end = 0 if node is None else node.end_mark.index
        if not may_have_comments and end < len(text.rstrip()):
            raise YamlError(f"{text[end:].strip()!r} would be a comment")
        if node is None:
            return None
        _count(node, {}, set())
        return loader.construct_document(node)
    except YamlError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise YamlError(one_line(error, most=None)) from None
    except RecursionError:
        raise YamlError("it is nested too deeply") from None
    finally:
        loader.dispose()


def parse_scalar(text: str) -> Any:
    """Return the number, truth value or null that a text is when it stands in YAML by itself, or the text.

    Raises:
        YamlError: It is a number that is too long.
    """
    loader = _Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_document(yaml.ScalarNode(tag, text))
    except (ValueError, yaml.YAMLError) as error:
        raise YamlError(one_line(error, most=None)) from None
    finally:
        loader.dispose()


def _count(node: yaml.Node, sizes: dict[int, int], above: set[int]) -> int:
    """Return the number of values below a node, aliases counted as often as they are used.

    Args:
        node: Node to count from.
        sizes: Numbers of nodes that were counted already, by identity; added to.
        above: Identities of the nodes that contain this one.

    Raises:
        YamlError: A mapping has a key twice, a node contains itself, or there are too many values.
    """
    if id(node) in above:
        raise YamlError(f"line {node.start_mark.line + 1}: an alias stands for what it is a part of")
    if id(node) in sizes:
        return sizes[id(node)]
    above.add(id(node))
    total = 1
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        for pair in node.value:
            total += sum(_count(each, sizes, above) for each in pair)
    elif isinstance(node, yaml.SequenceNode):
        for each in node.value:
            total += _count(each, sizes, above)
    above.remove(id(node))
    if total > _MAX_VALUES:
        raise YamlError(f"it has more than {_MAX_VALUES} values, once its aliases are replaced")
    sizes[id(node)] = total
    return total


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            line = key.start_mark.line + 1
            if key.value in lines:
                first = lines[key.value]
                raise YamlError(
                    f"the key {key.value!r} is given twice, in lines {first} and {line}; remove one"
                )
            lines[key.value] = line


def file_text(data: bytes) -> str:
    """Decode the bytes of a file.

    Raises:
        YamlError: It is no UTF-8 text.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlError(f"it is not UTF-8 text ({error.reason} at byte {error.start})") from None
