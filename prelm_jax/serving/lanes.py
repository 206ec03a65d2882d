"""What waits for a device: requests, their examples in lanes by shape, and texts to generate."""

import asyncio
import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from prelm_jax.inference.batching import Program, Query
from prelm_jax.training.contract import Params

AnyProgram = Program[object, object]
AnyQuery = Query[object, object, object]


class Shape(NamedTuple):
    """What the examples of a batch share: the program, and the length to which they are padded."""

    program: AnyProgram
    length: int

    @property
    def tokens(self) -> int:
        """Of a row, padding included."""
        return self.length * self.program.texts

    @property
    def full_rows(self) -> int:
        return self.program.full_rows(self.length)


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request in the queue: its queries, and the future for their answers."""

    queries: Sequence[AnyQuery]
    future: "asyncio.Future[list[object]]"
    arrived: float
    tokens: int = 0  # Still in the queue, padding included.
    dead: bool = False
    answers: list[object] = dataclasses.field(default_factory=list)
    missing: list[int] = dataclasses.field(default_factory=list)  # Results that each query waits for.
    results: dict[tuple[int, int], object] = dataclasses.field(default_factory=dict)  # By query and example.


@dataclasses.dataclass(eq=False)
class Entry:
    """An example in the queue: the j-th of its ticket's i-th query."""

    ticket: Ticket
    i: int
    j: int
    example: object
    number: int  # In order of arrival.


@dataclasses.dataclass(eq=False)
class Generation:
    """A text to generate: `steps` takes the parameters and yields one event per token, which `emit` receives.

    After the last one `emit` receives None, after an error the exception.
    """

    params: Params
    steps: Callable[[Params], Iterator[object]]
    emit: Callable[[object], None]
    deadline: float
    dead: bool = False
    running: Iterator[object] | None = None


class Lane:
    """A queue of entries, grouped by shape; the oldest first in each group."""

    def __init__(self) -> None:
        self.groups: dict[Shape, collections.deque[Entry]] = {}

    def oldest(self) -> Shape | None:
        """The shape of the entry that has waited longest. Drops entries of tickets that are dead."""
        for shape, group in list(self.groups.items()):
            while group and group[0].ticket.dead:
                group.popleft()
            if not group:
                del self.groups[shape]
        return min(self.groups, key=lambda shape: self.groups[shape][0].number, default=None)

    def take(self, shape: Shape, count: int) -> list[Entry]:
        """Removes and returns up to `count` entries of a shape."""
        group, taken = self.groups.get(shape, collections.deque[Entry]()), []
        while group and len(taken) < count:
            if not (entry := group.popleft()).ticket.dead:
                taken.append(entry)
        return taken


def choose_rows(waiting: int, allowed: Sequence[int]) -> int:
    """The rows of the next batch: the fewest that hold all waiting examples, unless half or more would be padding.

    choose_rows(3, (1, 4, 16))  # 4: one row of padding
    choose_rows(5, (1, 4, 16))  # 4: the fifth example goes into the next batch
    """
    for rows in allowed:
        if rows >= waiting and (2 * waiting > rows or rows == allowed[0]):
            return rows
    return max((rows for rows in allowed if rows <= waiting), default=allowed[0])
