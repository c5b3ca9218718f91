"""Prompts written by the user: a Jinja template over a row's columns, a system message, or both."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from shardes.errors import UserError
from shardes.tasks.base import PlacedRow, Prompt, Row
from shardes.tasks.rows import shown
from shardes.utils.limits import SECONDS, LimitError, limited_map

if TYPE_CHECKING:
    import jinja2

MAX_PROMPT_CHARACTERS = 2**24
"""A longer text is no prompt of any model, and would only take long to be found too long."""


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


def make_prompts(
    make_prompt: Callable[[Row], Prompt], rows: Sequence[PlacedRow], *, template: str | None, key: str
) -> list[Prompt]:
    """Return the prompt of each row; a template is rendered under limits of time and memory.

    Args:
        make_prompt: What ``prompt_maker`` returned.
        rows: The rows.
        template: The template that it renders; None: there is none.
        key: The configuration's section, for messages.

    Raises:
        UserError: The template fails for a row, which the message names.
    """

    def made(row: PlacedRow) -> tuple[Any, str | None]:
        try:
            return make_prompt(row), None
        except UserError as error:
            return None, str(error)

    prompts: list[Prompt] = []
    try:
        for prompt, problem in (
            map(made, rows) if template is None else limited_map(made, rows, seconds=SECONDS)
        ):
            if problem is not None:
                raise UserError(f"{rows[len(prompts)].where}: {problem}")
            prompts.append(prompt)
    except LimitError as error:
        raise UserError(f"{rows[error.index].where}: {key}.template {error}; give a simpler one") from None
    return prompts


def _renderer(template: str, key: str) -> Callable[[Row], Prompt]:
    def problem(text: str) -> str | None:
        try:
            _compiled(text)
        except UserError as error:
            return str(error)
        return None

    # Constant expressions are computed as the template is read, which may take for ever.
    try:
        (found,) = limited_map(problem, [template], seconds=SECONDS)
    except LimitError as error:
        raise UserError(f"{key}.template: reading it {error}; give a simpler one") from None
    if found is not None:
        raise UserError(f"{key}.template: {found}; wanted: Jinja")
    compiled = _compiled(template)
    return lambda row: _rendered(compiled, row, key)


def _compiled(template: str) -> "jinja2.Template":
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    # A prompt is a function of its row: the same on every rank and in every job of a run.
    del environment.filters["random"], environment.globals["lipsum"]
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"line {error.lineno}: {error.message}") from None
    except (ValueError, ArithmeticError, TypeError, RecursionError) as error:
        raise UserError(f"{type(error).__name__}: {error}") from None


def _rendered(template: "jinja2.Template", row: Row, key: str) -> str:
    try:
        # A mapping, not keywords: a column may have any name.
        text = template.render(dict(row))
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(
            f"{key}.template fails ({type(error).__name__}: {error}); the row has {', '.join(map(repr, row))}"
        ) from None
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise UserError(f"{key}.template makes a text of {len(text)} characters; give a shorter one")
    return text


def check_prompt(prompt: Any, where: str, *, may_be_empty: bool = False) -> None:
    """Refuse a value that is no prompt.

    Args:
        prompt: The value that a row or a template gave.
        where: Names the row in the message.
        may_be_empty: Accepts an empty text.

    Raises:
        UserError: It is neither a text nor a list of chat messages, or it is empty.
    """
    messages = list(enumerate(prompt, start=1)) if isinstance(prompt, list) else []
    wrong = next((f", whose message {i} is {shown(m)}" for i, m in messages if not _is_message(m)), "")
    if wrong or not isinstance(prompt, str | list) or not (prompt or may_be_empty):
        raise UserError(
            f"{where}: prompt is {shown(prompt)}{wrong}; wanted a non-empty text, or a list of chat messages "
            'such as [{"role": "user", "content": "..."}]; if another column holds it, say so with '
            "task.columns={prompt: COLUMN}"
        )


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content, calls = message.get("content"), message.get("tool_calls")
    return isinstance(content, str) or (content is None and isinstance(calls, list) and bool(calls))
