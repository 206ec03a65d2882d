"""The routes, as a Starlette application: hosts, keys, bodies, errors. The handlers are in `handlers`."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from prelm_jax import __version__
from prelm_jax.errors import InputError
from prelm_jax.serving import fields as of
from prelm_jax.serving.fields import STRING, Field, Fields, schema
from prelm_jax.serving.handlers import Handlers
from prelm_jax.serving.protocol import Refusal, failure, reply
from prelm_jax.serving.service import Service

MAX_BODY = 8 * 2**20
MAX_BODIES = 32 * MAX_BODY  # Of all requests that are being answered.
Handler = Callable[[Fields, Request], Awaitable[Response]]
Endpoint = Callable[[Request], Awaitable[Response]]


class KnownHosts:
    """Passes on the requests to these hosts ("*": to any), and refuses others.

    Without it, a web page could give its own name the address of this server (DNS rebinding) and read the answers.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]):
        self._app, self._hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(given) != 1:
            refusal = Refusal(400, f"a request has one Host header, not {len(given)}", code="bad_host")
        elif "*" not in self._hosts and host_name(given[0]) not in self._hosts:
            refusal = Refusal(421, "this server has another name; see --allowed-host", code="unknown_host")
        else:
            await self._app(scope, receive, send)
            return
        await refusal.response()(scope, receive, send)


def host_name(host: str) -> str:
    """A Host header without its port: "[::1]" for "[::1]:8000"; "" for a malformed one."""
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:]*)(:\d{1,5})?", host.lower())
    return found[1] if found else ""


class Routes:
    """The routes of a service, and their descriptions in OpenAPI's form.

    Open routes need no key. A handler's docstring is its summary.
    """

    def __init__(self, service: Service):
        self._service = service
        self.routes: list[Route] = []
        self.paths: dict[str, object] = {}

    def get(
        self, path: str, handler: Callable[[Request], Response], is_open: bool = False, **described: object
    ) -> None:
        async def endpoint(request: Request) -> Response:
            return handler(request)

        self._add("GET", path, endpoint, is_open, handler.__doc__, **described)

    def post(self, path: str, handler: Handler, *declared: Field, ignores_others: bool = False) -> None:
        """Adds a route for JSON with the declared fields; `ignores_others`: other fields are not an error."""
        service = self._service

        async def endpoint(request: Request) -> Response:
            began = time.monotonic()
            async with received(request, service) as body:
                fields = Fields(body, declared, ignores_others)
                if service.batcher is not None:
                    service.batcher.check_room(fields.num_items)
                response = await until_disconnected(request, handler(fields, request))
            service.seconds.observe(time.monotonic() - began)
            return response

        content = {"application/json": {"schema": schema(declared, ignores_others)}}
        body = {"required": True, "content": content}
        self._add("POST", path, endpoint, False, handler.__doc__, requestBody=body)

    def _add(
        self, method: str, path: str, endpoint: Endpoint, is_open: bool, summary: str | None, **described: object
    ) -> None:
        name = path.replace(":path", "")
        self.routes.append(Route(path, guarded(self._service, name, endpoint, is_open), methods=[method]))
        error = {"description": "an error, as OpenAI's API has it"}
        self.paths[name] = {
            method.lower(): {
                "summary": (summary or "").partition("\n")[0],
                "responses": {"200": {"description": "the answer"}, "4XX": error, "5XX": error},
                **described,
            }
        }

    async def not_found(self, request: Request, error: Exception) -> Response:
        message = f"there is no {request.url.path[:100]}; there are {', '.join(self.paths)}"
        return Refusal(404, message, code="no_such_route").response()

    async def no_method(self, request: Request, error: Exception) -> Response:
        route = next(route for route in self.routes if route.matches(request.scope)[0] != Match.NONE)
        allowed = ", ".join(sorted(route.methods or ()))
        message = f"{request.url.path} takes {allowed}"
        return Refusal(405, message, code="method_not_allowed", headers={"allow": allowed}).response()


def make_app(service: Service, hosts: Collection[str] = ("*",)) -> ASGIApp:
    """The application, for requests to these hosts."""
    handlers, routes = Handlers(service), Routes(service)
    get, post = routes.get, routes.post
    policy = content_security_policy(service.page)
    headers = {"content-security-policy": policy, "referrer-policy": "no-referrer", "cache-control": "no-cache"}

    def page(request: Request) -> Response:
        """The page."""
        return Response(service.page, headers=headers, media_type="text/html")

    def openapi(request: Request) -> Response:
        """This description."""
        info = {"title": "prelm", "version": __version__}
        return reply({"openapi": "3.1.0", "info": info, "paths": routes.paths})

    get("/", page, is_open=True)
    get("/health", handlers.health, is_open=True)
    get("/info", handlers.info)
    get("/metrics", handlers.metrics)
    get("/openapi.json", openapi)
    get("/v1/models", handlers.models)
    name = {"name": "name", "in": "path", "required": True, "schema": STRING}
    get("/v1/models/{name:path}", handlers.one_model, parameters=[name])
    post("/v1/embeddings", handlers.openai_embeddings, *of.OPENAI_EMBEDDINGS, ignores_others=True)
    post("/v1/completions", handlers.openai_completions, *of.OPENAI_COMPLETIONS, ignores_others=True)
    post("/embed", handlers.embed, of.TEXTS, of.POOLING, of.LAYERS, of.NORMALIZE, of.PROMPT_NAME, of.TRUNCATE)
    post("/similarity", handlers.similarity, of.TEXTS, of.OTHERS, of.TRUNCATE)
    post("/tokenize", handlers.tokenize, of.TEXTS, of.SPECIAL_TOKENS)
    post("/fill", handlers.fill, of.TEXTS, of.TOP_K)
    post("/score", handlers.score, of.TEXTS, of.TRUNCATE)
    post("/encode", handlers.encode, of.ID, of.TEXTS, of.IS_TOKENIZED, ignores_others=True)
    post("/classify", handlers.classify, of.CLASSIFIED)
    post("/tag", handlers.tag, of.TAGGED)
    post("/answer", handlers.answer, of.QUESTIONS, of.NULL_THRESHOLD, of.NUM_ANSWERS)
    post("/choose", handlers.choose, of.CHOICES)

    app = Starlette(routes=routes.routes, exception_handlers={404: routes.not_found, 405: routes.no_method})
    app.router.redirect_slashes = False  # A redirect would lead to plain HTTP, even behind a proxy that speaks TLS.
    return KnownHosts(app, hosts)


def guarded(service: Service, name: str, endpoint: Endpoint, is_open: bool) -> Endpoint:
    """An endpoint with the check of the key (unless `is_open`), errors as JSON, and metrics for the route's name."""

    async def guard(request: Request) -> Response:
        try:
            if service.key is not None and not is_open:
                check_key(request, service.key)
            response = await endpoint(request)
        except Refusal as refusal:
            response = refusal.response()
        except InputError as error:
            response = Refusal(400, str(error)).response()
        except (ClientDisconnect, Disconnected):
            response = Response(status_code=499)  # For the metrics; nobody reads it.
        except asyncio.CancelledError:
            response = Refusal(503, "the server is stopping", code="stopping").response()
        except Exception as error:
            response = failure(error).response()
        service.requests.add(name, str(response.status_code))
        response.headers["x-content-type-options"] = "nosniff"
        if re.fullmatch(r"[\w.-]{1,64}", given := request.headers.get("x-request-id", ""), re.ASCII):
            response.headers["x-request-id"] = given
        return response

    return guard


def check_key(request: Request, key: str) -> None:
    """Raises a Refusal (401) for a request without the key."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode(), key.encode()):
        message = "the key is missing or wrong; send Authorization: Bearer KEY"
        raise Refusal(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


@contextlib.asynccontextmanager
async def received(request: Request, service: Service) -> AsyncIterator[bytes]:
    """The bytes of a JSON body, which count as the service's until the block ends.

    Raises a Refusal: another type (415), too large (413), too many at once (503).
    """
    if "upgrade" in request.headers.get("connection", "").lower():  # httptools takes the body for another protocol.
        message = "this server speaks HTTP/1.1 only; send the request without an Upgrade header"
        raise Refusal(400, message, code="upgrade", headers={"connection": "close"})
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the content-type must be application/json", code="unsupported_media_type")
    close = {"connection": "close"}
    too_large = Refusal(413, f"the body may have {MAX_BODY} bytes", code="body_too_large", headers=close)
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            service.body_bytes += len(chunk)
            if len(body) > MAX_BODY:
                raise too_large
            if service.body_bytes > MAX_BODIES:
                message = "too many large requests at once"
                raise Refusal(503, message, code="overloaded", headers=close, retry_after=1)
        yield bytes(body)
    finally:
        service.body_bytes -= len(body)


class Disconnected(Exception):
    """The client closed the connection before it was answered."""


async def until_disconnected(request: Request, answer: Awaitable[Response]) -> Response:
    """Awaits an answer, and cancels it when the client disconnects."""
    task = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


def content_security_policy(page: bytes) -> str:
    """Allows the page its own scripts and styles, by their hashes, and requests to this server; nothing else."""

    def hashes(tag: bytes) -> str:
        found = re.findall(rb"<%s[^>]*>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(each).digest()).decode()}'" for each in found)

    sources = {"script-src": hashes(b"script"), "style-src": hashes(b"style")}
    inline = "; ".join(f"{name} {value or chr(39) + 'none' + chr(39)}" for name, value in sources.items())
    return (
        f"default-src 'none'; {inline}; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
