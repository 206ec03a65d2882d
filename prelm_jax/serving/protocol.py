"""JSON in and out: fields of requests with their types and bounds, and errors in the form of OpenAI's."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import numpy as np
import orjson
from starlette.responses import Response

from prelm_jax.errors import InputError

MAX_TEXTS = 2048
Value = TypeVar("Value")


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


class Fields:
    """The fields of a request. Each reader returns the value, or raises a Refusal (400) that names the field."""

    def __init__(self, body: bytes):
        try:
            content = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise Refusal(400, f"the body is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise Refusal(400, "the body must be a JSON object")
        self._content: dict[str, object] = content
        self._read: set[str] = set()

    @property
    def num_items(self) -> int:
        """The length of the longest list."""
        return max((len(value) for value in self._content.values() if isinstance(value, list)), default=0)

    def get(self, name: str) -> object:
        """The value of a field, None if it is null or missing."""
        self._read.add(name)
        return self._content.get(name)

    def text(self, name: str, default: str | None = None) -> str:
        return self._value(name, default, lambda value: isinstance(value, str), "a string")

    def boolean(self, name: str, default: bool) -> bool:
        return self._value(name, default, lambda value: isinstance(value, bool), "true or false")

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        def fits(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

        return self._value(name, default, fits, f"a whole number from {low} to {high}")

    def number(self, name: str, default: float, low: float, high: float) -> float:
        def fits(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

        return self._value(name, default, fits, f"a number from {low:g} to {high:g}")

    def texts(self, name: str) -> list[str]:
        """A string, or a list of strings."""
        value = self.get(name)
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise Refusal(400, f"{name} must be a string or a list of strings", name)
        return checked_number(name, value)

    def items(self, name: str, rule: str, fits: Callable[[object], bool]) -> list[object]:
        """A list whose items fit a rule; a text may stand alone."""
        value = self.get(name)
        value = cast(list[object], [value]) if isinstance(value, str) else value
        if not isinstance(value, list) or not all(map(fits, value)):
            raise Refusal(400, f"{name} must be a list, each item {rule}", name)
        return checked_number(name, value)

    def integers(self, name: str, default: Sequence[int], low: int, high: int) -> tuple[int, ...]:
        """A whole number, or a list of them."""
        value = self.get(name)
        value = list(default) if value is None else [value] if isinstance(value, int) else value
        if not is_ids(value, low, high) or not value:
            raise Refusal(400, f"{name} must be whole numbers from {low} to {high}", name)
        return tuple(cast(list[int], value))

    def only(self, name: str, *allowed: object) -> None:
        """Refuses a field that asks for something that this server does not do."""
        value = self.get(name)
        if value is not None and value not in allowed:
            raise Refusal(400, f"{name} is not supported; leave it out", name, "unsupported")

    def no_others(self) -> None:
        """Refuses fields that were not read."""
        if others := sorted(self._content.keys() - self._read):
            known = ", ".join(sorted(self._read))
            raise Refusal(400, f"there is no field {others[0]}; the fields are {known}", others[0])

    def _value(self, name: str, default: Value | None, fits: Callable[[object], bool], rule: str) -> Value:
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not fits(value):
            raise Refusal(400, f"{name} must be {rule}", name)
        return value  # type: ignore[return-value]


def is_ids(value: object, low: int, high: int) -> bool:
    """Whether a value is a list of whole numbers in bounds."""
    return isinstance(value, list) and all(type(each) is int and low <= each <= high for each in value)


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_words(value: object) -> bool:
    """Whether a value is a list of texts, at least one."""
    return isinstance(value, list) and bool(value) and all(map(is_text, value))


def is_pair(value: object) -> bool:
    """Whether a value is a list of two texts."""
    return is_words(value) and len(cast(list[object], value)) == 2


def checked_number(name: str, texts: list[Value]) -> list[Value]:
    """The texts, if there are between 1 and MAX_TEXTS."""
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise Refusal(400, f"{name} has {len(texts)} texts; give 1 to {MAX_TEXTS}", name)
    return texts


def refused(error: InputError, param: str | None = None) -> Refusal:
    """A Refusal for what the model refuses."""
    return Refusal(400, str(error), param)
