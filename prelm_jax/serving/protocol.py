"""JSON out: answers, and errors in the form of OpenAI's."""

import base64
import math
from collections.abc import Mapping

import numpy as np
import orjson
from starlette.responses import Response


class Refusal(Exception):
    """A request that is answered with an error.

    param: the field that is wrong. code: a word for programs. retry_after: seconds until another try makes sense.
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


def reply(content: object, status: int = 200, headers: Mapping[str, str] = {}) -> Response:
    """A JSON response; arrays are written as lists, with the fewest digits that give their bits."""
    return Response(dumps(content), status, dict(headers), "application/json")


def dumps(content: object) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def in_base64(vector: np.ndarray) -> str:
    """The bytes of little-endian f32, as OpenAI's client decodes them."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
