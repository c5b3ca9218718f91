"""Refusals of requests, in the shape that OpenAI's clients expect."""

from typing import Any


class ApiError(Exception):
    """Refusal of a request.

    Args:
        message: What was got, what was wanted, and the remedy.
        status: HTTP status.
        param: The parameter that it concerns, such as ``messages[0].content``; None: none of them.
        code: Its kind, for programs.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def to_json(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def context_too_long(num_tokens: int, limit: int, *, param: str) -> ApiError:
    """Return the refusal of a prompt that leaves no place for an answer."""
    return ApiError(
        f"This model's maximum context length is {limit} tokens, the answer's included. However, your "
        f"prompt has {num_tokens} tokens. Please shorten it.",
        param=param,
        code="context_length_exceeded",
    )
