"""The routes: requests to queries, and answers to JSON. Starlette's application, without a server around it."""

import asyncio
import base64
import hashlib
import hmac
import re
import time
from collections.abc import Awaitable, Callable, Collection

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from prelm_jax import __version__
from prelm_jax.errors import InputError
from prelm_jax.serving import fields as of
from prelm_jax.serving.fields import STRING, Field, Fields, schema
from prelm_jax.serving.protocol import Refusal, reply
from prelm_jax.serving.service import Service
from prelm_jax.serving.verbs import Verbs

MAX_BODY = 8 * 2**20
MAX_BODIES = 32 * MAX_BODY  # Of all requests that are being read or answered.
Handler = Callable[[Fields, Request], Awaitable[Response]]
Endpoint = Callable[[Request], Awaitable[Response]]


class KnownHosts:
    """An application for requests to these hosts alone; others may come from a page that a browser was lured to.

    Without it, such a page could name this server as its own host (DNS rebinding), and read the answers.
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
    """A Host header without its port: "[::1]" for "[::1]:8000"."""
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:]*)(:\d{1,5})?", host.lower())
    return found[1] if found else ""


def make_app(service: Service, hosts: Collection[str] = ("*",)) -> ASGIApp:
    """The application, for requests to these hosts."""
    verbs, routes, paths = Verbs(service), list[Route](), dict[str, object]()

    def add(
        method: str, path: str, endpoint: Endpoint, is_open: bool, summary: str | None, **described: object
    ) -> None:
        """Adds a route, and its description in the form of OpenAPI."""
        routes.append(route := Route(path, guarded(service, endpoint, is_open), methods=[method]))
        error = {"description": "an error, as OpenAI's API has it"}
        paths[route.path_format] = {
            method.lower(): {
                "summary": (summary or "").partition("\n")[0],
                "responses": {"200": {"description": "the answer"}, "4XX": error, "5XX": error},
                **described,
            }
        }

    def post(path: str, handler: Handler, *declared: Field, ignores_others: bool = False) -> None:
        async def endpoint(request: Request) -> Response:
            began = time.monotonic()
            body = await read_body(request, service)
            service.body_bytes += len(body)
            try:
                fields = Fields(body, declared, ignores_others)
                if service.batcher is not None:
                    service.batcher.check_room(fields.num_items)
                response = await until_disconnected(request, handler(fields, request))
            finally:
                service.body_bytes -= len(body)
            service.seconds.observe(time.monotonic() - began)
            return response

        content = {"application/json": {"schema": schema(declared, ignores_others)}}
        body = {"required": True, "content": content}
        add("POST", path, endpoint, False, handler.__doc__, requestBody=body)

    def get(path: str, handler: Callable[[Request], Response], is_open: bool = False, **described: object) -> None:
        async def endpoint(request: Request) -> Response:
            return handler(request)

        add("GET", path, endpoint, is_open, handler.__doc__, **described)

    policy = content_security_policy(service.page)
    headers = {"content-security-policy": policy, "referrer-policy": "no-referrer", "cache-control": "no-cache"}

    def page(request: Request) -> Response:
        """The page."""
        return Response(service.page, headers=headers, media_type="text/html")

    def openapi(request: Request) -> Response:
        """This description."""
        return reply({"openapi": "3.1.0", "info": {"title": "prelm", "version": __version__}, "paths": paths})

    name = {"name": "name", "in": "path", "required": True, "schema": STRING}
    get("/", page, is_open=True)
    get("/health", verbs.health, is_open=True)
    get("/info", verbs.info)
    get("/metrics", verbs.metrics)
    get("/openapi.json", openapi)
    get("/v1/models", verbs.models)
    get("/v1/models/{name:path}", verbs.one_model, parameters=[name])
    post("/v1/embeddings", verbs.openai_embeddings, *of.OPENAI_EMBEDDINGS, ignores_others=True)
    post("/v1/completions", verbs.openai_completions, *of.OPENAI_COMPLETIONS, ignores_others=True)
    post("/embed", verbs.embed, of.TEXTS, of.POOLING, of.LAYERS, of.NORMALIZE, of.PROMPT_NAME, of.TRUNCATE)
    post("/similarity", verbs.similarity, of.TEXTS, of.OTHERS, of.TRUNCATE)
    post("/tokenize", verbs.tokenize, of.TEXTS, of.SPECIAL_TOKENS)
    post("/fill", verbs.fill, of.TEXTS, of.TOP_K)
    post("/score", verbs.score, of.TEXTS, of.TRUNCATE)
    post("/encode", verbs.encode, of.ID, of.TEXTS, of.IS_TOKENIZED, ignores_others=True)
    post("/classify", verbs.classify, of.CLASSIFIED)
    post("/tag", verbs.tag, of.TAGGED)
    post("/answer", verbs.answer, of.QUESTIONS, of.NULL_THRESHOLD, of.NUM_ANSWERS)
    post("/choose", verbs.choose, of.CHOICES)

    async def not_found(request: Request, error: Exception) -> Response:
        message = f"there is no {request.url.path[:100]}; there are {', '.join(paths)}"
        return Refusal(404, message, code="no_such_route").response()

    async def no_method(request: Request, error: Exception) -> Response:
        route = next(route for route in routes if route.matches(request.scope)[0] != Match.NONE)
        allowed = ", ".join(sorted(route.methods or ()))
        message = f"{request.url.path} takes {allowed}"
        return Refusal(405, message, code="method_not_allowed", headers={"allow": allowed}).response()

    app = Starlette(routes=routes, exception_handlers={404: not_found, 405: no_method})
    return KnownHosts(app, hosts)


def guarded(service: Service, endpoint: Endpoint, is_open: bool) -> Endpoint:
    """An endpoint that asks for the key, answers every error as JSON, and is counted."""

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
            response = Response(status_code=499)  # Nobody reads it.
        except asyncio.CancelledError:
            response = Refusal(503, "the server is stopping", code="stopping").response()
        except Exception as error:
            response = Refusal(500, f"the model failed: {type(error).__name__}", code="failed").response()
        service.requests.add(request.url.path, str(response.status_code))
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


async def read_body(request: Request, service: Service) -> bytes:
    """The body, of JSON. Raises a Refusal for another type (415), a large one (413), or too many at once (503)."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the content-type must be application/json", code="unsupported_media_type")
    body = bytearray()
    too_large = Refusal(
        413, f"the body may have {MAX_BODY} bytes", code="body_too_large", headers={"connection": "close"}
    )
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY:
        raise too_large
    if service.body_bytes + int(length) > MAX_BODIES:
        raise Refusal(503, "too many large requests at once", code="overloaded", retry_after=1)
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise too_large
    return bytes(body)


class Disconnected(Exception):
    """The client left before its answer was there."""


async def until_disconnected(request: Request, answer: Awaitable[Response]) -> Response:
    """An answer; it is cancelled when the client leaves."""
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
    """What the page may do: run its own scripts and styles, known by their hashes, and ask this server."""

    def hashes(tag: bytes) -> str:
        found = re.findall(rb"<%s[^>]*>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(each).digest()).decode()}'" for each in found)

    sources = {"script-src": hashes(b"script"), "style-src": hashes(b"style")}
    inline = "; ".join(f"{name} {value or chr(39) + 'none' + chr(39)}" for name, value in sources.items())
    return (
        f"default-src 'none'; {inline}; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
