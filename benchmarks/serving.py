"""Speed of `prelm serve` against sentence-transformers in FastAPI and infinity, with the same model on the same cores.

    python benchmarks/serving.py MODEL [--servers ours fastapi infinity] [--seconds 5] [--rounds 3] [--json FILE]

MODEL is a directory of sentence-transformers. FastAPI and sentence-transformers must be installed for `fastapi`;
`infinity` is started by the command --infinity, of an environment of its own. All servers and libraries run on
--server-cores and the client on --client-core. They take turns in each round; ratios are of medians.

short:  the call of a library in a process of its own with one short sentence.
closed: each of N clients sends the short sentence, waits for the vector, and sends the next: requests a second, and
        milliseconds of processor time of the server for each.
open:   requests come at random times (Poisson) at a part of the requests a second of 32 clients. The latency counts
        from the time at which a request was due, so that a server that falls behind does not hide it.
bulk:   256 texts of mixed lengths in a request, or in a call of a library: texts a second.
full:   the time until a full queue says 429, to a request of 512 texts.

The overhead of a server is the time of a request (closed, one client) without that of the call (short).
"""

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SHORT = "A man is eating a piece of bread by the river."
WORDS = [
    "the",
    "of",
    "a",
    "man",
    "woman",
    "river",
    "house",
    "bread",
    "green",
    "quickly",
    "through",
    "because",
    "model",
    "language",
    "context",
    "sentence",
]
# In fp32 as the others, with vectors computed for each request, and routes where OpenAI has them.
INFINITY = [
    *("--host", "127.0.0.1", "--url-prefix", "/v1", "--log-level", "error"),
    *("--device", "cpu", "--dtype", "float32", "--no-bettertransformer", "--no-vector-disk-cache"),
]
Result = dict[str, float]


def fastapi_app(model: str):
    """The peer: sentence-transformers behind a route that FastAPI runs in its threads."""
    from fastapi import FastAPI
    from pydantic import BaseModel
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, device="cpu")
    app = FastAPI()

    class Texts(BaseModel):
        input: list[str]

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/embeddings")
    def embeddings(texts: Texts) -> dict[str, object]:
        vectors = encoder.encode(texts.input)
        return {"data": [{"index": i, "embedding": vector.tolist()} for i, vector in enumerate(vectors)]}

    return app


def serve_peer(model: str, port: int, threads: int) -> None:
    import torch
    import uvicorn

    torch.set_num_threads(threads)
    uvicorn.run(fastapi_app(model), port=port, log_level="error")


class Server:
    """A server process, on some cores if they are given; at the same port whenever it is started."""

    def __init__(self, name: str, model: str, cores: Sequence[int] = (), infinity: str = "infinity_emb"):
        self.name, self._cores = name, cores
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        port = str(self.port)
        self._command = {
            "ours": [sys.executable, "-m", "prelm_jax", "serve", model, "--port", port],
            "fastapi": [sys.executable, __file__, model, "--peer", port, "--threads", str(len(cores))],
            "infinity": [infinity, "v2", "--model-id", model, "--port", port, *INFINITY],
        }[name]
        self.start()

    def start(self) -> None:
        environment = dict(os.environ, INFINITY_ANONYMOUS_USAGE_STATS="0", HF_HUB_OFFLINE="1")
        if self.name == "infinity":
            environment.pop("PYTHONPATH", None)  # Of this environment.
        self.process = subprocess.Popen(
            self._command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.sched_setaffinity(self.process.pid, self._cores or os.sched_getaffinity(0))

    async def ready(self) -> None:
        """Waits until requests are answered."""
        while (await self.get("/health"))[0] != 200:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} ended: {' '.join(self._command)}")
            await asyncio.sleep(0.1)

    async def idle(self) -> None:
        """Waits until it does nothing but wait for requests."""
        before = -1.0
        while before != (before := self.cpu_seconds()):
            await asyncio.sleep(1)

    async def get(self, path: str) -> tuple[int, bytes]:
        """The status and the body of an answer; 0 if there is none."""
        connection = Connection(self.port)
        try:
            status, _, body = await connection.ask(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            return status, body
        except (OSError, asyncio.IncompleteReadError):
            return 0, b""
        finally:
            connection.close()

    def memory(self) -> float:
        """MB of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def cpu_seconds(self) -> float:
        """Processor time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


class Library:
    """A library that is called in a process of its own on some cores."""

    def __init__(self, name: str, model: str, cores: list[int]):
        self.name = name
        command = [sys.executable, __file__, model, "--library", name, "--threads", str(len(cores))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        os.sched_setaffinity(self._process.pid, cores)
        for what in ("short", "bulk"):  # Compiles.
            self.call(what, 0)

    def call(self, what: str, seconds: float) -> Result:
        """The result of `call_library` there."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(what, seconds, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def stop(self) -> None:
        self._process.communicate()


def embedding_request(texts: list[str]) -> bytes:
    """The bytes of a request for the vectors of texts."""
    return post("/v1/embeddings", json.dumps({"input": texts}).encode())


def post(path: str, body: bytes, number: int = 0) -> bytes:
    """The bytes of a request."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nx-request-id: {number}"
    return f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


class Connection:
    """A connection that is kept for many requests, and opened when it is needed."""

    def __init__(self, port: int):
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, request: bytes) -> None:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=2**26)
        self._streams[1].write(request)

    async def receive(self) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body)."""
        assert self._streams is not None
        head = (await self._streams[0].readuntil(b"\r\n\r\n")).decode().lower()
        headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        body = await self._streams[0].readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            self.close()
        return int(head[9:12]), headers, body

    async def ask(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """The answer to a request: status, headers, body. A server may have closed a connection that was idle."""
        was_open = self._streams is not None
        try:
            await self.send(request)
            return await self.receive()
        except (OSError, asyncio.IncompleteReadError):
            if not was_open:
                raise
            self.close()
            return await self.ask(request)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def closed(server: Server, request: bytes, clients: int, seconds: float) -> Result:
    """Clients that each wait for an answer before they ask again."""
    latencies: list[float] = []
    end = time.monotonic() + seconds

    async def client() -> None:
        connection = Connection(server.port)
        while (began := time.monotonic()) < end:
            status, _, _ = await connection.ask(request)
            assert status == 200, status
            latencies.append(time.monotonic() - began)
        connection.close()

    before, began = server.cpu_seconds(), time.monotonic()
    await asyncio.gather(*(client() for _ in range(clients)))
    used, elapsed = server.cpu_seconds() - before, time.monotonic() - began
    return {
        "per_second": len(latencies) / elapsed,
        "cpu_ms": 1000 * used / len(latencies),
        "p50_ms": 1000 * statistics.median(latencies),
    }


async def opened(server: Server, request: bytes, rate: float, seconds: float, seed: int) -> Result:
    """Requests at random times, whether or not earlier ones are answered."""
    rng, free, latencies = random.Random(seed), [Connection(server.port) for _ in range(256)], []
    began, due = time.monotonic(), 0.0

    async def ask(due: float) -> None:
        connection = free.pop() if free else Connection(server.port)
        status, _, _ = await connection.ask(request)
        assert status == 200, status
        latencies.append(time.monotonic() - began - due)
        free.append(connection)

    async with asyncio.TaskGroup() as group:
        while (due := due + rng.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, began + due - time.monotonic()))
            group.create_task(ask(due))
    for connection in free:
        connection.close()
    latencies.sort()
    return {"p50_ms": 1000 * statistics.median(latencies), "p99_ms": 1000 * latencies[int(0.99 * len(latencies))]}


async def full(server: Server) -> Result:
    """Asks for more than the queue takes: the times of twenty refusals."""
    request = embedding_request([" ".join(WORDS * 6)] * 512)
    connections = [Connection(server.port) for _ in range(8)]
    tasks = [asyncio.create_task(connection.ask(request)) for connection in connections]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)  # The first one is refused.
    another, times = Connection(server.port), []
    for _ in range(20):
        began = time.monotonic()
        status, _, _ = await another.ask(request)
        assert status == 429, status
        times.append(1000 * (time.monotonic() - began))
    for task in tasks:
        task.cancel()
    for connection in [*connections, another]:
        connection.close()
    return {"p50_ms": statistics.median(times), "max_ms": max(times)}


def mixed_texts(count: int) -> list[str]:
    """Texts of log-normal lengths, of about 24 words in the median."""
    rng = random.Random(0)
    lengths = (min(200, max(2, round(rng.lognormvariate(3.2, 0.8)))) for _ in range(count))
    return [" ".join(rng.choices(WORDS, k=length)) for length in lengths]


def call_library(name: str, model: str, threads: int) -> None:
    """For each line of the input, "short SECONDS" or "bulk SECONDS", the speed of the library as a line of JSON."""
    if name == "ours":
        import prelm_jax

        loaded = prelm_jax.load(model)

        def vector(text: str) -> None:  # As the server does it, in a batch of one row.
            query = loaded.vector_query(loaded.frame(loaded.split([text])[0]), loaded.pooling)
            program, (example,) = query.program, query.examples
            query.finish(program.compute(program.params, [example], 1, program.length(example)))

        def vectors(texts: list[str]) -> None:
            list(loaded.vectors(texts, truncate=True))
    else:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        encoder = SentenceTransformer(model, device="cpu")
        vector = vectors = encoder.encode
    texts = mixed_texts(256)
    for line in sys.stdin:
        what, seconds = line.split()
        latencies: list[float] = []
        used, end = time.process_time(), time.monotonic() + float(seconds)
        while time.monotonic() < end or len(latencies) < 2:
            began = time.perf_counter()
            if what == "short":
                vector(SHORT)
            else:
                vectors(texts)
            latencies.append(time.perf_counter() - began)
        median, count = statistics.median(latencies), len(texts)
        cpu = 1000 * (time.process_time() - used) / len(latencies)
        result = {"p50_ms": 1000 * median, "cpu_ms": cpu} if what == "short" else {"texts_per_second": count / median}
        print(json.dumps(result), flush=True)


def measure(
    servers: list[Server], libraries: list[Library], rounds: int, seconds: float
) -> dict[str, dict[str, list[Result]]]:
    """Results by measurement and server or library; they take turns."""
    results: dict[str, dict[str, list[Result]]] = {}
    short, texts = embedding_request([SHORT]), mixed_texts(256)
    bulk = embedding_request(texts)

    def add(what: str, name: str, found: Result) -> None:
        results.setdefault(what, {}).setdefault(name, []).append(found)
        numbers = "  ".join(f"{name} {value:.1f}" for name, value in found.items())
        print(f"{what:12} {name:12} {numbers}", flush=True)

    for server in servers:  # Compiles what is not compiled yet.
        asyncio.run(closed(server, short, 32, 1))
        asyncio.run(closed(server, bulk, 1, 0.1))
    for turn in range(rounds):
        for library in libraries:
            add("short", library.name, library.call("short", seconds))
        for clients in (1, 32):
            for server in servers:
                add(f"closed {clients}", server.name, asyncio.run(closed(server, short, clients, seconds)))
        for part in (0.5, 0.8):
            for server in servers:
                rate = part * median(results["closed 32"][server.name], "per_second")
                found = asyncio.run(opened(server, short, rate, 2 * seconds, turn))
                add(f"open {part:.0%}", server.name, found)
        for server in servers:
            found = asyncio.run(closed(server, bulk, 1, seconds))
            add("bulk", server.name, {"texts_per_second": len(texts) * found["per_second"]})
        for library in libraries:
            add("bulk", f"{library.name} (call)", library.call("bulk", seconds))
    for server in servers:
        if server.name == "ours":
            add("full", server.name, asyncio.run(full(server)))
    return results


def median(results: list[Result], name: str) -> float:
    return statistics.median(result[name] for result in results)


def ratios(results: dict[str, dict[str, list[Result]]]) -> dict[str, float]:
    """What the server is judged by, from the medians of what was measured."""

    def value(what: str, server: str, name: str) -> float:
        return median(results[what][server], name) if server in results.get(what, {}) else float("nan")

    found = {}
    for clients in ("closed 1", "closed 32"):
        for peer in ("fastapi", "infinity"):
            for name in ("per_second", "cpu_ms"):
                found[f"{clients}: {name} / {peer}"] = value(clients, "ours", name) / value(clients, peer, name)
    speed = value("bulk", "ours", "texts_per_second")
    found["bulk: texts_per_second / call of sentence-transformers"] = speed / value(
        "bulk", "sentence-transformers (call)", "texts_per_second"
    )
    solo = value("closed 1", "ours", "p50_ms")
    found["overhead: p50_ms"] = solo - value("short", "ours", "p50_ms")
    found["overhead: cpu_ms"] = value("closed 1", "ours", "cpu_ms") - value("short", "ours", "cpu_ms")
    for part in ("50%", "80%"):
        found[f"open {part}: p99_ms / p50_ms of one client"] = value(f"open {part}", "ours", "p99_ms") / solo
    return {name: number for name, number in found.items() if number == number}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--servers", nargs="+", default=["ours", "fastapi"])
    parser.add_argument("--server-cores", type=int, nargs="+", default=[0])
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--infinity", default="infinity_emb", help="the command that starts infinity")
    parser.add_argument("--in-process", action="store_true", help="also the libraries without a server")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--library", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        serve_peer(options.model, options.peer, options.threads)
        return
    if options.library:
        call_library(options.library, options.model, options.threads)
        return
    os.sched_setaffinity(0, [options.client_core])
    started: list[Server | Library] = []
    try:
        for name in options.servers:
            began, server = time.monotonic(), Server(name, options.model, options.server_cores, options.infinity)
            started.append(server)
            asyncio.run(server.ready())
            used, seconds = server.cpu_seconds(), time.monotonic() - began
            print(f"{name}: ready after {seconds:.1f} s, {used:.1f} of the processor", flush=True)
            asyncio.run(server.idle())
        for name in ("ours", "sentence-transformers") if options.in_process else ():
            started.append(Library(name, options.model, options.server_cores))
        servers = [each for each in started if isinstance(each, Server)]
        libraries = [each for each in started if isinstance(each, Library)]
        found = measure(servers, libraries, options.rounds, options.seconds)
    finally:
        for each in started:
            each.stop()
    print("\nmedians")
    for what, by_server in found.items():
        for name, rounds in by_server.items():
            numbers = "  ".join(f"{key} {median(rounds, key):.2f}" for key in rounds[0])
            print(f"{what:12} {name:12} {numbers}")
    print("\nours")
    for name, number in ratios(found).items():
        print(f"{name:60} {number:.2f}")
    if options.json:
        versions = {name: _version(name) for name in ("jax", "sentence-transformers", "torch", "fastapi", "uvicorn")}
        content = {"machine": platform.processor(), "versions": versions, "ratios": ratios(found), "results": found}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
