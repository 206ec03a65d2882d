"""Labelled examples: what the readers of files make, and what frames write as tokens."""

from dataclasses import dataclass
from typing import Annotated, Literal

from prelm_jax.bounds import Bounds

# What the label of an example is:
# label   one name                                     "positive"
# labels  several names or none                        ("toxic", "insult")
# number  a number                                     3.8
# choice  the number of the right sequence, from 0     2
# tags    a name a word                                ("B-PER", "O")
# spans   where the second part holds the answer    Answers(("in 1912",), (84,))
Kind = Literal["label", "labels", "number", "choice", "tags", "spans"]

Part = str | tuple[str, ...]  # A text, or the words of a text that is to be tagged.


@dataclass(frozen=True)
class Answers:
    """The accepted answers to a question: their texts, and the character of the passage at which each begins.

    A question that the passage does not answer has none: `Answers()`.
    """

    texts: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()


Label = str | tuple[str, ...] | int | float | Answers


@dataclass(frozen=True)
class Example:
    """One to many sequences of one or two parts, and their label.

    One sequence, but for `choice`: there it is one for each option, (shared text, option). The parts of `spans` are
    (question, passage), those of `tags` are (words,).

    Example: `Example("0", (("Is it open?", "The shop is closed."),), "contradiction")`.
    """

    id: str  # From the file, or the example's number in it, from 0; unique in a file.
    sequences: tuple[tuple[Part, ...], ...]
    label: Label | None = None  # By kind, see Kind; None: not known.


@dataclass(frozen=True)
class Columns:
    """Where the parts of an example are: names of columns or fields, or numbers of columns, from 0 (-1: the last)."""

    text: str | None = None  # Text, words to tag, or question; if unset, text, tokens or question.
    pair: str | None = None  # Second text of a pair, passage, or common beginning of all options.
    label: str | None = None  # Label; if unset, label, labels, tags or answers, by task.
    # Several labels: one column of 0 and 1 per label, instead of --columns.label.
    indicators: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # Choice: one column per option, or one with a list of them (options if unset).
    first_option: Annotated[int, Bounds(0, 1)] = 0  # Choice: the label of the first option, if labels are numbers.
    id: str | None = None  # Identifier of an example in predictions; if unset, its number in the file.
