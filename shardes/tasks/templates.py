"""Prompts written by the user: a Jinja template over a row's columns, a system message, or both."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shardes.errors import UserError
from shardes.tasks.base import Prompt, Row
from shardes.tasks.rows import shown

if TYPE_CHECKING:
    import jinja2


def prompt_column(row: Row) -> Any:
    """Return the row's own prompt, unchecked; ``check_prompt`` refuses what is none."""
    return row.get("prompt")


def prompt_maker(
    make_prompt: Callable[[Row], Prompt], *, template: str | None, system: str | None, key: str
) -> Callable[[Row], Prompt]:
    """Return the function that makes prompts under a template and a system message.

    Args:
        make_prompt: Makes the prompt where there is no template.
        template: Jinja text whose variables are the row's columns; None: ``make_prompt``'s prompt.
        system: The system message of a chat; the prompt's text becomes the user's message. An empty text
            makes a chat without a system message. None: the prompt stays as it is.
        key: The configuration's section, for messages.

    Returns:
        A function that raises ``UserError``, without a place, for a row that the template fails for.

    Raises:
        UserError: The template is not valid.
    """
    render = make_prompt if template is None else _renderer(template, key)
    if system is None:
        return render

    def in_chat(row: Row) -> Prompt:
        prompt = render(row)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        rest = [message for message in messages if message["role"] != "system"]
        return [{"role": "system", "content": system}, *rest] if system else rest

    return in_chat


def _renderer(template: str, key: str) -> Callable[[Row], Prompt]:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{key}.template: line {error.lineno}: {error.message}; wanted: Jinja") from None
    return lambda row: _rendered(compiled, row, key)


def _rendered(template: "jinja2.Template", row: Row, key: str) -> str:
    try:
        # A mapping, not keywords: a column may have any name.
        return template.render(dict(row))
    except Exception as error:
        raise UserError(
            f"{key}.template fails ({type(error).__name__}: {error}); the row has {', '.join(map(repr, row))}"
        ) from None


def check_prompt(prompt: Any, where: str, *, may_be_empty: bool = False) -> None:
    """Refuse a value that is no prompt.

    Args:
        prompt: The value that a row or a template gave.
        where: Names the row in the message.
        may_be_empty: Accepts an empty text.

    Raises:
        UserError: It is neither a text nor a list of chat messages, or it is empty.
    """
    is_chat = isinstance(prompt, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in prompt
    )
    if not (isinstance(prompt, str) or is_chat) or not (prompt or may_be_empty):
        raise UserError(
            f"{where}: prompt is {shown(prompt)}; wanted a non-empty text, or a list of chat messages "
            'such as [{"role": "user", "content": "..."}]; if another column holds it, say so with '
            "task.columns={prompt: COLUMN}"
        )
