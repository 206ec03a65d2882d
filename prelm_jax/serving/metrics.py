"""Counters and histograms in the text format of Prometheus."""

import bisect
import itertools
import threading
from collections.abc import Callable, Sequence

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Counter:
    """A number that only grows, for each combination of labels."""

    def __init__(self, name: str, help: str, *labels: str):
        self._name, self._help, self._labels = name, help, labels
        self._values: dict[tuple[str, ...], float] = {}
        self._lock = threading.Lock()

    def add(self, *labels: str, by: float = 1) -> None:
        with self._lock:
            self._values[labels] = self._values.get(labels, 0) + by

    def lines(self) -> list[str]:
        values = dict(self._values) or ({} if self._labels else {(): 0.0})
        return [
            f"# HELP {self._name} {self._help}",
            f"# TYPE {self._name} counter",
            *(f"{self._name}{_labels(self._labels, key)} {value:g}" for key, value in sorted(values.items())),
        ]


class Gauge:
    """A number that is read when the metrics are."""

    def __init__(self, name: str, help: str, value: Callable[[], float]):
        self._name, self._help, self._value = name, help, value

    def lines(self) -> list[str]:
        return [f"# HELP {self._name} {self._help}", f"# TYPE {self._name} gauge", f"{self._name} {self._value():g}"]


class Histogram:
    """The number of observed values up to each of some bounds, and their sum."""

    def __init__(self, name: str, help: str, bounds: Sequence[float]):
        self._name, self._help, self._bounds = name, help, bounds
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        with self._lock:
            self._counts[bisect.bisect_left(self._bounds, value)] += 1
            self._sum += value

    def lines(self) -> list[str]:
        with self._lock:
            counts, total = list(itertools.accumulate(self._counts)), self._sum
        bounds = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        return [
            f"# HELP {self._name} {self._help}",
            f"# TYPE {self._name} histogram",
            *(f'{self._name}_bucket{{le="{bound}"}} {count}' for bound, count in zip(bounds, counts, strict=True)),
            f"{self._name}_sum {total:g}",
            f"{self._name}_count {counts[-1]}",
        ]


def render(metrics: Sequence[Counter | Gauge | Histogram]) -> bytes:
    """Metrics in Prometheus' text format."""
    return "\n".join([line for metric in metrics for line in metric.lines()] + [""]).encode()


def _labels(names: Sequence[str], values: Sequence[str]) -> str:
    pairs = ",".join(f'{name}="{value}"' for name, value in zip(names, values, strict=True))
    return f"{{{pairs}}}" if pairs else ""
