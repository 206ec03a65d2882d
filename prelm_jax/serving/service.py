"""The state that all routes share."""

import time
from importlib import resources

from prelm_jax.serving.batcher import Batcher
from prelm_jax.serving.lanes import AnyProgram
from prelm_jax.serving.metrics import SECONDS, Counter, Gauge, Histogram, render
from prelm_jax.serving.model import ServedModel
from prelm_jax.serving.protocol import Refusal


class Service:
    """The model and its batcher once they are loaded; the key, the page and the metrics."""

    def __init__(self, name: str, key: str | None = None):
        self.name, self.key = name, key
        self.model: ServedModel | None = None
        self.batcher: Batcher | None = None
        self.state = "loading"
        self._essential: list[AnyProgram] = []  # Must be compiled before the server is ready.
        self.started = time.time()
        self.body_bytes = 0
        self.requests = Counter("prelm_requests_total", "Requests.", "path", "status")
        self.seconds = Histogram("prelm_request_seconds", "Time from the end of a request to its answer.", SECONDS)
        self.page = resources.files("prelm_jax.serving").joinpath("page.html").read_bytes()

    @property
    def ready(self) -> tuple[ServedModel, Batcher]:
        """The model and its batcher. Raises a Refusal (503) until they are ready."""
        if self.model is None or self.batcher is None or not self.is_ready:
            message = "the model is loading; /health says how far it is"
            raise Refusal(503, message, code=self.state, retry_after=2)
        return self.model, self.batcher

    @property
    def is_ready(self) -> bool:
        """Whether the model is loaded and its first program is compiled."""
        if self.state == "loading" and self.batcher is not None and self.progress == 1:
            self.state = "ready"
        return self.state == "ready"

    @property
    def progress(self) -> float:
        """The fraction of the essential shapes that are compiled."""
        if self.batcher is None:
            return 0.0
        shapes = sum(len(program.lengths) for program in self._essential) * self.batcher.num_devices
        return 1 - self.batcher.num_cold(self._essential) / max(1, shapes)

    def start(self, model: ServedModel, batcher: Batcher) -> None:
        """Starts the batcher, which compiles the programs; the server is ready once the first of them is compiled."""
        self._essential = model.programs[:1]
        batcher.warm(model.programs)
        batcher.start()
        self.model, self.batcher = model, batcher

    def metrics(self) -> bytes:
        found: list[Counter | Gauge | Histogram] = [self.requests, self.seconds]
        if (batcher := self.batcher) is not None:
            found += [batcher.batch_rows, batcher.batch_seconds, batcher.queue_seconds, batcher.dropped]
            found += [batcher.tokens, batcher.generated]
            found += [Gauge("prelm_queue_tokens", "Tokens that wait, padding included.", lambda: batcher.queue_tokens)]
        return render(found)
