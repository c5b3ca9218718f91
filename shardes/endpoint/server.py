"""HTTP server of a rank's endpoint, in a thread of its own, on the loopback interface alone."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from shardes.endpoint.errors import ApiError
from shardes.endpoint.request_queue import ANY_MODEL, Credentials, PendingRequest, RequestQueue
from shardes.endpoint.requests import Request, SamplingSettings, read_chat, read_completion
from shardes.endpoint.responses import Reply, body_of, events_of, model_card
from shardes.utils.closing import Closing

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
_MAX_BODY_BYTES = 1 << 26
# How long open connections may take to end when the server does.
_END_SECONDS = 2


class EndpointServer(Closing):
    """Server of ``/EPISODE/v1/chat/completions``, ``/completions`` and ``/models``.

    Each episode has a base URL and a key of its own, by which its requests are told from others'.

    Args:
        queue: Takes the requests.
        sampling: How the run draws tokens.

    Attributes:
        port: Port of the loopback interface, which the kernel has chosen.
    """

    def __init__(self, queue: RequestQueue, sampling: SamplingSettings) -> None:
        self._queue = queue
        self._sampling = sampling
        self._socket = _bound()
        self.port: int = self._socket.getsockname()[1]
        methods: dict[str, tuple[str, Callable[..., Any]]] = {
            "chat/completions": ("POST", self._chat),
            "completions": ("POST", self._completion),
            "models": ("GET", self._models),
            "models/{name}": ("GET", self._model),
        }
        app = Starlette(
            routes=[
                Route(f"/{{episode}}/v1/{path}", endpoint, methods=[method])
                for path, (method, endpoint) in methods.items()
            ],
            exception_handlers={ApiError: _refuse, HTTPException: _refuse_path},
        )
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            http="h11",
            ws="none",
            loop="asyncio",
            timeout_keep_alive=3600,  # a client that reuses a connection must not find it just closed
            timeout_graceful_shutdown=_END_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="endpoint", daemon=True
        )
        self._thread.start()

    def url_of(self, credentials: Credentials) -> str:
        """Return an episode's base URL, for ``OPENAI_BASE_URL``."""
        return f"http://{HOST}:{self.port}/{credentials.episode}/v1"

    def close(self) -> None:
        """Refuse all that waits, and end the server."""
        self._queue.close()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    async def _chat(self, http: HttpRequest) -> Response:
        return await self._answer(http, read_chat)

    async def _completion(self, http: HttpRequest) -> Response:
        return await self._answer(http, read_completion)

    async def _models(self, http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [model_card(self._credentials(http).model)]})

    async def _model(self, http: HttpRequest) -> Response:
        credentials = self._credentials(http)
        _check_model(credentials, http.path_params["name"])
        return JSONResponse(model_card(credentials.model))

    async def _answer(self, http: HttpRequest, read: Callable[[Any, SamplingSettings], Request]) -> Response:
        credentials = self._credentials(http)
        body = await _body(http)
        request = read(body, self._sampling)
        _check_model(credentials, request.model)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reply | ApiError] = loop.create_future()

        def deliver(reply: Reply | ApiError) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(_set, future, reply)

        ask = self._queue.ask(credentials.episode, request, body, deliver)
        reply = await self._reply(http, ask, future)
        if isinstance(reply, ApiError):
            raise reply
        if request.is_streamed:
            events = events_of(reply, request, model=credentials.model, number=ask.number)
            return Response("".join(events), media_type="text/event-stream")
        return JSONResponse(body_of(reply, request, model=credentials.model, number=ask.number))

    async def _reply(
        self, http: HttpRequest, ask: PendingRequest, future: "asyncio.Future[Reply | ApiError]"
    ) -> Reply | ApiError:
        """Wait for the answer, or until whoever has asked goes away."""
        gone = asyncio.ensure_future(_gone(http))
        both: list[asyncio.Future[Any]] = [future, gone]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if future.done():
                return future.result()
            raise _gone_away()
        finally:
            gone.cancel()
            self._queue.withdraw(ask)

    def _credentials(self, http: HttpRequest) -> Credentials:
        kind, _, key = http.headers.get("authorization", "").partition(" ")
        credentials = self._queue.seat_of(
            http.path_params["episode"], key.strip() if kind.lower() == "bearer" else ""
        )
        if credentials is None:
            raise ApiError(
                "Incorrect API key provided, or the episode is over; the key is in OPENAI_API_KEY, and goes "
                "with the URL in OPENAI_BASE_URL",
                status=401,
                code="invalid_api_key",
            )
        return credentials


def _set(future: "asyncio.Future[Reply | ApiError]", reply: Reply | ApiError) -> None:
    if not future.done():
        future.set_result(reply)


def _bound() -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.bind((HOST, 0))
    bound.listen(1024)
    return bound


async def _body(http: HttpRequest) -> Any:
    data = bytearray()
    try:
        async for chunk in http.stream():
            data += chunk
            if len(data) > _MAX_BODY_BYTES:
                raise ApiError(f"the body: more than {_MAX_BODY_BYTES} bytes", status=413)
    except ClientDisconnect:
        raise _gone_away() from None
    try:
        return json.loads(data)
    except ValueError as error:
        raise ApiError(f"the body: is no JSON ({error})") from None


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _gone_away() -> ApiError:
    return ApiError("the client has closed the connection", status=499)


def _check_model(credentials: Credentials, name: str) -> None:
    if name not in (credentials.model, ANY_MODEL):
        raise ApiError(
            f"The model {name!r} does not exist; this episode's is {credentials.model!r} (OPENAI_MODEL), "
            f"which {ANY_MODEL!r} stands for, too",
            status=404,
            param="model",
            code="model_not_found",
        )


async def _refuse(_http: HttpRequest, error: ApiError) -> Response:
    return JSONResponse(error.to_json(), error.status)


async def _refuse_path(http: HttpRequest, error: HTTPException) -> Response:
    unknown = ApiError(
        f"Invalid URL ({http.method} {http.url.path}): {error.detail}", status=error.status_code
    )
    return JSONResponse(unknown.to_json(), error.status_code)
