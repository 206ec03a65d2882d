"""The fields of requests, each declared once: type, bounds and default, for validation and for /openapi.json."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar, cast

import orjson

from prelm_jax.serving.protocol import Refusal

MAX_TEXTS = 2048
MAX_LOGPROBS = 5
MAX_CHOICES = 16
MAX_LAYERS = 100
MAX_OPTIONS = 16  # Of a choice; each is a text of one row of the model.
Value = TypeVar("Value")
Schema = Mapping[str, object]
STRING: Schema = {"type": "string"}


@dataclasses.dataclass(frozen=True)
class Field(Generic[Value]):
    """A field of a request.

    rule: what its value must be, for error messages. schema: the same for /openapi.json. fits: the check. alone: a
    single value of this type is read as a list of one. default: for a field that is missing or null.
    """

    name: str
    rule: str
    schema: Schema
    fits: Callable[[object], bool]
    alone: type | None = None
    default: Value | None = None
    is_required: bool = True

    def or_else(self, default: Value) -> "Field[Value]":
        """The field with a default."""
        return dataclasses.replace(self, default=default, schema={**self.schema, "default": default}, is_required=False)

    def or_none(self) -> "Field[Value | None]":
        """The field, None where it is missing."""
        return cast("Field[Value | None]", dataclasses.replace(self, is_required=False))

    def read(self, value: object) -> Value:
        """The value, or a Refusal (400) that names the field."""
        if value is None and not self.is_required:
            return cast(Value, self.default)
        if type(value) is self.alone:
            value = [value]
        if not self.fits(value):
            raise Refusal(400, f"{self.name} must be {self.rule}", self.name)
        return cast(Value, value)


class Fields:
    """The values of a request's fields: `fields[TRUNCATE]`."""

    def __init__(self, body: bytes, declared: Sequence[Field[object]], ignores_others: bool):
        try:
            content = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise Refusal(400, f"the body is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise Refusal(400, "the body must be a JSON object")
        names = [field.name for field in declared]
        if not ignores_others and (others := sorted(content.keys() - set(names))):
            other = others[0][:100]
            raise Refusal(400, f"there is no field {other}; the fields are {', '.join(names)}", other)
        self._values = {field.name: field.read(content.get(field.name)) for field in declared}

    def __getitem__(self, field: Field[Value]) -> Value:
        return cast(Value, self._values[field.name])

    @property
    def num_items(self) -> int:
        """The length of the longest list; a list of ids is one item."""
        lists = [value for value in self._values.values() if isinstance(value, list) and value]
        return max((1 if isinstance(value[0], int) else len(value) for value in lists), default=0)


def schema(declared: Sequence[Field[object]], ignores_others: bool) -> Schema:
    """The JSON schema of a body with these fields."""
    return {
        "type": "object",
        "properties": {field.name: field.schema for field in declared},
        "required": [field.name for field in declared if field.is_required],
        "additionalProperties": ignores_others,
    }


def text(name: str, choices: Sequence[str] = ()) -> Field[str]:
    """A string; with choices, one of them."""
    if not choices:
        return Field(name, "a string", STRING, is_text)
    return Field(name, " or ".join(choices), {"enum": list(choices)}, lambda value: value in choices)


def boolean(name: str) -> Field[bool]:
    return Field(name, "true or false", {"type": "boolean"}, lambda value: isinstance(value, bool))


def integer(name: str, low: int, high: int | None = None) -> Field[int]:
    """A whole number, from `low` to `high`."""

    def fits(value: object) -> bool:
        return type(value) is int and low <= value and (high is None or value <= high)

    bounds = {"minimum": low} if high is None else {"minimum": low, "maximum": high}
    rule = f"a whole number, at least {low}" if high is None else f"a whole number from {low} to {high}"
    return Field(name, rule, {"type": "integer", **bounds}, fits)


def number(name: str, low: float, high: float) -> Field[float]:
    """A number from `low` to `high`."""

    def fits(value: object) -> bool:
        return type(value) in (int, float) and low <= cast(float, value) <= high

    bounds = {"minimum": low, "maximum": high}
    return Field(name, f"a number from {low:g} to {high:g}", {"type": "number", **bounds}, fits)


def texts(name: str, most: int = MAX_TEXTS, shortest: int = 0) -> Field[list[str]]:
    """A string, or a list of strings."""
    item = {**STRING, "minLength": shortest} if shortest else STRING
    rule = f"a text of at least {shortest} characters" if shortest else "a text"
    return items(name, rule, item, lambda value: isinstance(value, str) and len(value) >= shortest, most)


def items(
    name: str, rule: str, item: Schema, fits: Callable[[object], bool], most: int = MAX_TEXTS
) -> Field[list[Value]]:
    """A list of items that fit; one text without a list too, if a text fits."""

    def all_fit(value: object) -> bool:
        return isinstance(value, list) and 1 <= len(value) <= most and all(map(fits, value))

    array = {"type": "array", "items": item, "minItems": 1, "maxItems": most}
    takes_one = fits("text")
    return Field(
        name,
        f"a list of 1 to {most}, each {rule}" + (", or one text" if takes_one else ""),
        {"anyOf": [STRING, array]} if takes_one else array,
        all_fit,
        str if takes_one else None,
    )


def integers(name: str, most: int) -> Field[list[int]]:
    """A whole number, or a list of them."""

    def fits(value: object) -> bool:
        return is_ids(value, -(2**31), 2**31) and 1 <= len(cast(list[int], value)) <= most

    array = {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": most}
    rule = f"a whole number, or a list of up to {most} of them"
    return Field(name, rule, {"anyOf": [{"type": "integer"}, array]}, fits, int)


def anything(name: str, schema: Schema) -> Field[object]:
    """Any value; the route checks it."""
    return Field(name, "", schema, lambda value: True, is_required=False)


def neutral(name: str, value: object) -> Field[object]:
    """A field that is not supported: only the value that changes nothing is accepted."""
    rule = "left out; it is not supported"
    return Field(name, rule, {"const": value, "default": value}, lambda given: given == value, is_required=False)


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


def is_choice(value: object) -> bool:
    """Whether a value is a list of a text and a list of texts, its options."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    given, options = value
    return is_text(given) and is_words(options) and len(options) <= MAX_OPTIONS


WORDS: Schema = {"type": "array", "items": STRING, "minItems": 1}
OPTIONS: Schema = {**WORDS, "maxItems": MAX_OPTIONS}
PAIR: Schema = {"type": "array", "items": STRING, "minItems": 2, "maxItems": 2}
IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
INPUT: Schema = {
    "anyOf": [STRING, WORDS, IDS, {"type": "array", "items": IDS, "minItems": 1}],
    "description": f"a text, texts, ids, or lists of ids; at most {MAX_TEXTS}",
}

TEXTS = texts("texts")
TRUNCATE = boolean("truncate").or_else(False)
MODEL = text("model").or_none()
# Of OpenAI's embeddings.
EMBEDDED = anything("input", INPUT)
ENCODING = text("encoding_format", ("float", "base64")).or_else("float")
DIMENSIONS = integer("dimensions", 1).or_none()
# Of OpenAI's completions.
PROMPT = anything("prompt", INPUT)
MAX_TOKENS = integer("max_tokens", 0).or_else(16)
TEMPERATURE = number("temperature", 0, 2).or_else(1)
TOP_P = number("top_p", 1e-6, 1).or_else(1)
SEED = integer("seed", 0, 2**32 - 1).or_none()
NUM_CHOICES = integer("n", 1, MAX_CHOICES).or_else(1)
STOP = texts("stop", 4, 1).or_none()
STREAM = boolean("stream").or_else(False)
ECHO = boolean("echo").or_else(False)
LOGPROBS = integer("logprobs", 0, MAX_LOGPROBS).or_none()
UNSUPPORTED = (
    neutral("best_of", 1),
    neutral("presence_penalty", 0),
    neutral("frequency_penalty", 0),
    neutral("logit_bias", {}),
    neutral("suffix", ""),
)
OPENAI_EMBEDDINGS = (MODEL, EMBEDDED, ENCODING, DIMENSIONS, TRUNCATE)
OPENAI_COMPLETIONS = (
    *(MODEL, PROMPT, MAX_TOKENS, TEMPERATURE, TOP_P, SEED, NUM_CHOICES, STOP, STREAM, ECHO, LOGPROBS),
    *UNSUPPORTED,
)
# Of our own routes.
LAYERS = integers("layers", MAX_LAYERS).or_none()
POOLING = text("pooling").or_none()
NORMALIZE = boolean("normalize").or_none()
PROMPT_NAME = text("prompt").or_none()
OTHERS = texts("others").or_none()
SPECIAL_TOKENS = boolean("special_tokens").or_else(True)
TOP_K = integer("top_k", 1, 100).or_else(5)
CLASSIFIED: Field[list[str | list[str]]] = items(
    "texts", "a text or a pair of texts", {"anyOf": [STRING, PAIR]}, lambda each: is_text(each) or is_pair(each)
)
TAGGED: Field[list[str | list[str]]] = items(
    "texts", "a text or a list of words", {"anyOf": [STRING, WORDS]}, lambda each: is_text(each) or is_words(each)
)
QUESTIONS: Field[list[list[str]]] = items("questions", "a pair [question, passage]", PAIR, is_pair)
NULL_THRESHOLD = number("null_threshold", -1e9, 1e9).or_else(0)
NUM_ANSWERS = integer("top_k", 1, 20).or_else(5)
CHOICES: Field[list[tuple[str, list[str]]]] = items(
    "choices",
    f"a pair [text, options] with 1 to {MAX_OPTIONS} options",
    {"type": "array", "prefixItems": [STRING, OPTIONS], "minItems": 2, "maxItems": 2},
    is_choice,
)
# Of bert-as-service.
ID: Field[object] = Field(
    "id",
    "a number or a text",
    {"type": ["number", "string", "null"]},
    lambda value: isinstance(value, (int, float, str)),
    is_required=False,
)
IS_TOKENIZED = neutral("is_tokenized", False)
