"""One validator: types and bounds of flags, of experiments in Python, and of JSON."""

import dataclasses
import math
from typing import Annotated, Any, ClassVar, Literal

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from prelm_jax.bounds import Bounds, Fraction, FractionBelow1, OutOfBounds, Positive, Seed
from prelm_jax.cli.experiments import docstrings, load_run, load_task, shipped_files
from prelm_jax.cli.main import main
from prelm_jax.errors import InputError
from prelm_jax.validation import check, read


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: FractionBelow1 = 0.1
    pairs: tuple[tuple[Positive, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Other:
    other_keys: ClassVar[bool] = True
    number: int = 0


@dataclasses.dataclass(frozen=True)
class Outer:
    size: Positive
    inner: Inner = Inner()
    anything: Any = None
    name: str = "x"
    kind: Literal["a", "b"] = "a"
    bound: Positive | None = None
    on: bool = False
    table: dict[str, Positive] = dataclasses.field(default_factory=dict)

    def check_together(self) -> None:
        if self.bound == self.size:
            raise OutOfBounds(("bound",), self.bound, "must differ from size")


def complaint(function, *arguments, **keywords) -> str:
    with pytest.raises(InputError) as error:
        function(*arguments, **keywords)
    return str(error.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"size": 0}, "size is 0: must be at least 1"),
        ({"size": 2**31}, "size is 2147483648: must be at most 2147483647"),
        ({"size": True}, "size is true: must be an integer"),
        ({"size": 1.0}, "size is 1.0: must be an integer"),
        ({"size": "1"}, 'size is "1": must be an integer'),
        ({"size": None}, "size is null: must be an integer"),
        ({"bound": 0}, "bound is 0: must be at least 1"),
        ({"bound": 1}, "bound is 1: must differ from size"),
        ({"kind": "c"}, 'kind is "c": must be a or b'),
        ({"kind": ["a"]}, 'kind is ["a"]: must be a or b'),
        ({"on": 1}, "on is 1: must be true or false"),
        ({"name": 1}, "name is 1: must be UTF-8 text"),
        ({"name": "caf\udce9"}, r'name is "caf\udce9": must be UTF-8 text'),
        ({"table": {"x": 0}}, "table.x is 0: must be at least 1"),
        ({"table": 3}, "table is 3: must be an object"),
    ],
)
def test_the_same_complaints_of_python_and_json(fields, expected):
    fields = {"size": 1} | fields
    assert complaint(check, Outer(**fields)) == expected
    assert complaint(read, Outer, fields, "a.json") == f"a.json: {expected}"


def test_nested_values_are_named_by_their_path():
    assert complaint(check, Outer(1, inner=Inner(rate=1.0))) == "inner.rate is 1.0: must be below 1"
    assert complaint(check, Outer(1, anything=Inner(rate=-0.1))) == "anything.rate is -0.1: must be at least 0"
    assert complaint(check, Outer(1, anything=Outer(2, bound=2))).startswith("anything.bound is 2")
    assert complaint(check, Inner(pairs=((1, 1.0), (0, 1.0)))) == "pairs.1.0 is 0: must be at least 1"
    assert complaint(check, Inner(pairs=((1, 1.0), (1,)))).startswith("pairs.1 is [1]: must be a list of 2")
    assert complaint(check, Inner(pairs=[(1, 1.0)])) == "pairs is [[1, 1.0]]: must be ((1, 1.0),) in Python"
    assert complaint(check, Outer(1, inner=3)) == "inner is 3: must be an object"
    assert complaint(check, Outer(1, inner={"rate": 0.1})).endswith("must be Inner(rate=0.1, pairs=()) in Python")
    assert complaint(check, Outer(1, inner=Other())).endswith("must be an object")
    assert complaint(read, Outer, {"size": 1, "inner": 3}, "x") == "x: inner is 3: must be an object"
    assert complaint(read, Inner, {"pairs": {"1": 1}}, "x").startswith("x: pairs is")
    assert complaint(read, Outer, [], "x") == "x: the value is []: must be an object"


@pytest.mark.parametrize("x", [math.nan, math.inf, -math.inf, 10**400, 1e39, True, "1", None, [1]])
def test_floats_are_finite_numbers(x):
    assert "must be a finite number" in complaint(check, Inner(rate=x))
    assert "must be a finite number" in complaint(read, Inner, {"rate": x}, "x")


def test_json_becomes_what_is_declared():
    fields = {"size": 3, "inner": {"rate": 0, "pairs": [[1, 2], [3, 4.5]]}, "bound": 7, "table": {"a": 1}}
    found = read(Outer, fields, "x")
    assert found == Outer(3, Inner(0.0, ((1, 2.0), (3, 4.5))), bound=7, table={"a": 1})
    assert type(found.inner.rate) is float and type(found.inner.pairs[0][1]) is float


def test_keys_of_json():
    """Ours have no unknown ones, foreign formats may, at any depth; none that is needed is missing."""
    assert "x: sise is 3: there is no such field; fields: size," in complaint(read, Outer, {"sise": 3}, "x")
    assert complaint(read, Outer, {}, "x").startswith("x: size is null: must be given")
    assert read(Other, {"number": 3, "more": 1}, "x") == Other(3)
    assert complaint(read, Outer, {"size": 0}, "x", keys={"size": "n_sizes"}) == "x: n_sizes is 0: must be at least 1"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_any_json_is_read_or_refused(value):
    for annotation in (Outer, Inner, int, float | None, tuple[Fraction, ...], dict[str, Seed], list[str], Literal["a"]):
        try:
            read(annotation, value, "x")
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000


def test_bounds_are_exclusive_where_they_say_so():
    for x, kept in ((0.0, False), (0.5, True), (1.0, True), (1.5, False)):
        assert (Bounds(above=0, high=1).rule(x) is None) == kept
    check(0.5, Annotated[Fraction, Bounds(above=0)])
    assert complaint(check, 0.0, Annotated[Fraction, Bounds(above=0)], ("p",)) == "p is 0.0: must be above 0"


def test_no_size_of_a_paper_is_out_of_bounds():
    for file in shipped_files():
        for name in ("demo", "base", "large", "original"):
            if f"def {name}(" in file.read_text():
                check(load_run(f"{file.stem}:{name}")[1])
        if file.stem == "finetuning":
            for name in docstrings(file):
                check(load_task(f"finetuning:{name}")[1])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_run_checks_all_of_its_configs(family):
    """A config cannot forget it: whatever is in a Run is checked with it, a class from outside of the package too."""
    run = tiny.FAMILIES[family]()
    with pytest.raises(OutOfBounds, match=r"^model\.rate is 2"):
        dataclasses.replace(run, model=Inner(rate=2))
    with pytest.raises(OutOfBounds, match=r"^optimizer\.learning_rate is -1"):
        dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, learning_rate=-1))
    with pytest.raises(OutOfBounds, match=r"^loop\.mesh\.devices is 0"):
        tiny.with_loop(run, mesh=dataclasses.replace(run.loop.mesh, devices=0))


@pytest.mark.parametrize(
    ("experiment", "option", "value", "rule"),
    [
        ("bert:demo", "--seed", -1, "at least 0"),
        ("bert:demo", "--seed", 2**32, "at most 4294967295"),
        ("bert:demo", "--seed", 2**63, "at most"),
        ("bert:demo", "--evaluate-batches", 0, "at least 1"),
        ("bert:demo", "--evaluate-batches", -1, "at least 1"),
        ("bert:demo", "--mesh.devices", 0, "at least 1"),
        ("bert:demo", "--model.num-heads", 0, "at least 1"),
        ("bert:demo", "--model.hidden-size", 0, "at least 1"),
        ("bert:demo", "--model.num-layers", -1, "at least 1"),
        ("bert:demo", "--model.num-layers", 10**9, "at most 512"),
        ("bert:demo", "--model.hidden-dropout", "1", "below 1"),
        ("bert:demo", "--model.hidden-dropout", "2", "below 1"),
        ("bert:demo", "--model.hidden-dropout", "-0.1", "at least 0"),
        ("bert:demo", "--model.hidden-dropout", "nan", "finite"),
        ("bert:demo", "--optimizer.learning-rate", "-1", "at least 0"),
        ("bert:demo", "--optimizer.learning-rate", "inf", "finite"),
        ("bert:demo", "--optimizer.clip-norm", "0", "above 0"),
        ("bert:demo", "--optimizer.weight-decay", "-1", "at least 0"),
        ("bert:demo", "--optimizer.warmup-steps", -1, "at least 0"),
        ("bert:demo", "--optimizer.decay-steps", 0, "at least 1"),
        ("bert:demo", "--data.masking.probability", "0", "above 0"),
        ("elmo:demo", "--model.cell-clip", "0", "above 0"),
        ("elmo:demo", "--tokenizer.min-count", 0, "at least 1"),
        ("gpt1:demo", "--held-out", "1.5", "below 1"),
        ("gpt1:demo", "--accumulate", 0, "at least 1"),
        ("gpt1:demo", "--profile", -1, "at least 0"),
    ],
)
def test_options_of_an_experiment(capsys, experiment, option, value, rule):
    """The complaint names the option as it is typed, and comes before any work."""
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", experiment, f"{option}={value}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1 and line.startswith(f"prelm: {option} ") and rule in line


@pytest.mark.parametrize(
    "arguments",
    [
        "generate MODEL --prompt x --seed -1",
        "generate MODEL --prompt x --seed 18446744073709551616",
        "generate MODEL --prompt x --top-k 0",
        "generate MODEL --prompt x --top-k 1000000000000",
        "generate MODEL --prompt x --top-p 0",
        "generate MODEL --prompt x --temperature nan",
        "generate MODEL --prompt x --max-tokens -1",
        "fill MODEL x --top-k 0",
        "fill MODEL x --top-k -1",
        "embed MODEL lines.txt out --batch-size 0",
        "embed MODEL lines.txt out --batch-size 2147483647",
        "batch bert:demo --rows 0",
        "batch bert:demo --step -1",
        "tokenizer train words out --corpus x --vocab-size 3",
        "tokenizer train bpe out --corpus x --num-merges -1",
    ],
)
def test_options_of_commands(capsys, arguments):
    """They are refused before a model is loaded or a corpus read."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    (line,) = capsys.readouterr().err.splitlines()
    option = arguments.split()[-2]
    assert stopped.value.code == 1 and line.startswith(f"prelm: {option} ") and "must be" in line
