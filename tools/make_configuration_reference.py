"""Write docs/configuration.md, the reference of all configuration keys, from the schema.

    python tools/make_configuration_reference.py           # write the page
    python tools/make_configuration_reference.py --check   # exit status 1 if the page is out of date

Types, ranges and defaults are those of the pydantic models, meanings are the docstrings of their fields.
"""

import argparse
import ast
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from shardes.config.es import RacingConfig
from shardes.config.schema import Config
from shardes.config.task import ProblemSetConfig, RewardConfig, ScreeningConfig

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """\
# Configuration

<!-- Written by tools/make_configuration_reference.py from the schema in shardes/config: change that. -->

Every key with the values it takes, its default and its meaning. A configuration is a YAML file of the
sections below; keys whose default is `-` have to be given. `section.key=value` on the command line changes a
key: `es.sigma=0.002`, `task.columns={prompt: question}`. Where the key wants a text or a path, the value is
what was typed, `#` and `010` included (quotes around all of it are taken off, `null` is none); elsewhere it
is YAML. Numbers are decimal, in files too: `010` is ten. A key that a file gives twice is refused. Paths are
relative to where the command is started, and `~` at their beginning is the home directory. A key that would
have no effect is refused when the configuration is read; `config.yaml` in the run directory has every
default filled in.

[toolbox.md](toolbox.md) explains the algorithm (`es`), [tasks.md](tasks.md) and [rewards.md](rewards.md) the
problems, [planning.md](planning.md) the memory, [durability.md](durability.md) resumed runs.
[configs/quickstart.yaml](../configs/quickstart.yaml) is a short example.

Names of older versions are still read, with a warning: `es.schedule` (now `es.alpha_schedule`), `log.to`
(`log.report_to`), and `rollout.mode` (`rollout.gather` and `rollout.members_per_forward`).
"""
# Sections inside of a key's value, and their headings.
INNER: dict[type[BaseModel], str] = {
    RewardConfig: "Items of `task.rewards`",
    ScreeningConfig: "Keys of `task.screening`",
    ProblemSetConfig: "Values of `eval.sets`",
    RacingConfig: "The value of `es.racing`",
}
_WORDS = {
    "number": "number",
    "integer": "integer",
    "string": "text",
    "boolean": "`true` or `false`",
    "null": "`null`",
}
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the reference of all configuration keys.")
    parser.add_argument("--check", action="store_true", help="compare the page instead of writing it")
    is_check = parser.parse_args().check
    page = render()
    if is_check:
        return int(PAGE.read_text() != page)
    PAGE.write_text(page)
    return 0


def render() -> str:
    """Render the page as Markdown."""
    sections: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items()}
    tables = [_table(f"`{name}`", model) for name, model in sections.items()]
    tables += [_table(heading, model) for model, heading in INNER.items()]
    return "\n".join([HEAD, *tables])


def _table(heading: str, model: type[BaseModel]) -> str:
    """Return the keys of a section as a Markdown table below a heading."""
    meanings = docstrings_of(model)
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, schema in model.model_json_schema()["properties"].items():
        default = f"`{_written(schema['default'])}`" if "default" in schema else "-"
        cells = [f"`{key}`", shown_type(schema), default, meanings[key]]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    about = inspect.cleandoc(model.__doc__ or "").replace("``", "`")
    return f"## {heading}\n\n{about}\n\n" + "\n".join(rows) + "\n"


def docstrings_of(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstrings of a model's fields, inherited ones too, each as one line of Markdown."""
    found: dict[str, str] = {}
    for each in reversed(model.__mro__):
        if not issubclass(each, BaseModel) or each is BaseModel:
            continue
        (definition,) = ast.parse(inspect.getsource(each)).body
        assert isinstance(definition, ast.ClassDef)
        for field, after in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = " ".join(ast.literal_eval(after.value).replace("``", "`").split())
    return found


def shown_type(schema: dict[str, Any]) -> str:
    """Return the values that a JSON schema allows, in words.

    Raises:
        ValueError: It has a form that there are no words for yet.
    """
    if "anyOf" in schema:
        return ", or ".join(shown_type(each) for each in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{_written(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{_written(schema['const'])}`"
    if "$ref" in schema:
        (name,) = [title for model, title in INNER.items() if schema["$ref"].endswith(f"/{model.__name__}")]
        return f"as in [{name.lower()}](#{_anchor(name)})"
    kind = schema.get("type")
    if kind == "array":
        count = f" of {schema['minItems']} items" if "minItems" in schema else ""
        return f"list{count}, each {shown_type(schema['items'])}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return "mapping" + (f", each value {shown_type(inner)}" if isinstance(inner, dict) else "")
    if schema.get("format") == "path":
        return "path"
    if kind not in _WORDS:
        raise ValueError(f"no words for {schema}")
    bounds = [f"{words} {_number(schema[key])}" for key, words in _BOUNDS.items() if key in schema]
    return " ".join([_WORDS[kind], *filter(None, [" and ".join(bounds)])])


def _number(value: float) -> str:
    """Return a bound as a reader knows it: large powers of two as such."""
    exponent = int(value).bit_length() - 1
    return f"2^{exponent}" if exponent >= 16 and value == 2**exponent else str(value)


def _anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _written(value: Any) -> str:
    """Return a value as it is written in a YAML file."""
    return value if isinstance(value, str) and value else json.dumps(value)


if __name__ == "__main__":
    sys.exit(main())
