"""JSON answers, and errors in OpenAI's form."""

import base64
import math
import sys
import traceback
from collections.abc import Mapping

import numpy as np
import orjson
from starlette.responses import Response


class Refusal(Exception):
    """An error that a request is answered with.

    param: name of the wrong field. code: a word that programs can compare. retry_after: seconds to wait before a retry.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] = {},
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers)
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after)))

    @property
    def body(self) -> dict[str, object]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return reply(self.body, self.status, self.headers)


def failure(error: Exception) -> Refusal:
    """The answer (500) to an error of the server; where it happened is written to stderr."""
    traceback.print_exception(error, file=sys.stderr)
    return Refusal(500, f"the server failed: {type(error).__name__}", code="failed")


def reply(content: object, status: int = 200, headers: Mapping[str, str] = {}) -> Response:
    """A JSON response; arrays are written as lists, with the fewest digits that give their bits."""
    return Response(dumps(content), status, dict(headers), "application/json")


def dumps(content: object) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def in_base64(vector: np.ndarray) -> str:
    """A vector as OpenAI's client decodes it: the bytes of little-endian f32."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
