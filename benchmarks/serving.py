"""Speed of `prelm serve` against sentence-transformers in FastAPI, with the same model on the same cores.

    python benchmarks/serving.py MODEL [--servers ours fastapi] [--seconds 5] [--rounds 3] [--json FILE]

MODEL is a directory of sentence-transformers. FastAPI and sentence-transformers must be installed for `fastapi`, and
`http://…` is a server that runs already and answers OpenAI's /v1/embeddings (infinity, for example). All servers are
started on --server-cores and the client runs on --client-core. They take turns in each round; ratios are of medians.

closed: each of N clients sends a short sentence, waits for the vector, and sends the next: requests a second, and
        milliseconds of processor time of the server for each.
open:   requests come at random times (Poisson) at a part of the requests a second of 32 clients. The latency counts
        from the time at which a request was due, so that a server that falls behind does not hide it.
bulk:   requests of 256 texts of mixed lengths, one after the other: texts a second.
direct: the library's call with one short sentence against a request for it: what the server adds.
full:   the time until a full queue says 429.
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
from collections.abc import Coroutine
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
    """A server process on some cores, or the address of one that runs already."""

    def __init__(self, name: str, model: str, cores: list[int]):
        self.name, self.process = name, None
        if name.startswith("http"):
            self.port = int(name.rpartition(":")[2].strip("/"))
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "prelm_jax", "serve", model, "--port", str(self.port)]
        if name == "fastapi":
            command = [sys.executable, __file__, model, "--peer", str(self.port), "--threads", str(len(cores))]
        began = time.monotonic()
        self.process = subprocess.Popen(
            command, preexec_fn=lambda: os.sched_setaffinity(0, cores), stderr=subprocess.DEVNULL
        )
        while b'"ready"' not in asyncio.run(ask_once(self.port, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")):
            if self.process.poll() is not None:
                raise SystemExit(f"{name} ended: {' '.join(command)}")
            time.sleep(0.2)
        print(f"{name}: ready after {time.monotonic() - began:.1f} s", flush=True)

    def cpu_seconds(self) -> float:
        """Processor time of the process so far."""
        if self.process is None:
            return float("nan")
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)


def embedding_request(texts: list[str]) -> bytes:
    """The bytes of a request for the vectors of texts."""
    body = json.dumps({"input": texts}).encode()
    head = "POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
    return f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


class Connection:
    """A connection that is kept for many requests."""

    def __init__(self, port: int):
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """The status and the body of the answer."""
        if self._writer is None or self._reader is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**26)
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        return int(head[9:12]), await self._reader.readexactly(length)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


async def ask_once(port: int, request: bytes) -> bytes:
    connection = Connection(port)
    try:
        return (await connection.ask(request))[1]
    except (OSError, asyncio.IncompleteReadError):
        return b""
    finally:
        connection.close()


async def closed(server: Server, request: bytes, clients: int, seconds: float) -> Result:
    """Clients that each wait for an answer before they ask again."""
    latencies: list[float] = []
    end = time.monotonic() + seconds

    async def client() -> None:
        connection = Connection(server.port)
        while (began := time.monotonic()) < end:
            status, _ = await connection.ask(request)
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
        status, _ = await connection.ask(request)
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
    """Asks for more than the queue takes; the time of the first 429, and whether there was one."""
    texts = [" ".join(WORDS * 6)] * 512
    request = embedding_request(texts)
    connections = [Connection(server.port) for _ in range(8)]
    tasks = [asyncio.create_task(connection.ask(request)) for connection in connections]
    await asyncio.sleep(1)
    began = time.monotonic()
    status, _ = await Connection(server.port).ask(request)
    elapsed = time.monotonic() - began
    for task in tasks:
        task.cancel()
    for connection in connections:
        connection.close()
    return {"refused_ms": 1000 * elapsed if status == 429 else float("nan")}


def mixed_texts(count: int) -> list[str]:
    """Texts of log-normal lengths, of about 24 words in the median."""
    rng = random.Random(0)
    lengths = (min(200, max(2, round(rng.lognormvariate(3.2, 0.8)))) for _ in range(count))
    return [" ".join(rng.choices(WORDS, k=length)) for length in lengths]


def direct(model: str, seconds: float) -> Result:
    """The median time of the library's own call with the short sentence, in a batch of one row."""
    import prelm_jax

    loaded = prelm_jax.load(model)
    program, params = loaded.embed_program, loaded.params
    ids = loaded.frame(loaded.split([SHORT])[0])
    times: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times) < 10:
        began = time.perf_counter()
        loaded.split([SHORT])
        program.compute(params, [ids], 1, program.length(ids))
        times.append(time.perf_counter() - began)
    return {"p50_ms": 1000 * statistics.median(times[3:])}


def direct_sentence_transformers(model: str, threads: int, texts: list[str], seconds: float) -> Result:
    """Texts a second of `SentenceTransformer.encode` in this process."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    encoder = SentenceTransformer(model, device="cpu")
    rates: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(rates) < 2:
        began = time.monotonic()
        encoder.encode(texts)
        rates.append(len(texts) / (time.monotonic() - began))
    return {"texts_per_second": statistics.median(rates)}


def measure(servers: list[Server], rounds: int, seconds: float) -> dict[str, dict[str, list[Result]]]:
    """Results by measurement and server; the servers take turns."""
    results: dict[str, dict[str, list[Result]]] = {}
    short, texts = embedding_request([SHORT]), mixed_texts(256)
    bulk = embedding_request(texts)

    def run(what: str, server: Server, work: Coroutine[None, None, Result]) -> None:
        found = asyncio.run(work)
        results.setdefault(what, {}).setdefault(server.name, []).append(found)
        numbers = "  ".join(f"{name} {value:.1f}" for name, value in found.items())
        print(f"{what:12} {server.name:12} {numbers}", flush=True)

    for server in servers:  # Compiles what is not compiled yet.
        asyncio.run(closed(server, short, 32, 1))
        asyncio.run(closed(server, bulk, 1, 0.1))
    for turn in range(rounds):
        for clients in (1, 32):
            for server in servers:
                run(f"closed {clients}", server, closed(server, short, clients, seconds))
        for part in (0.5, 0.8):
            for server in servers:
                rates = [found["per_second"] for found in results["closed 32"][server.name]]
                rate = part * statistics.median(rates)
                run(f"open {part:.0%}", server, opened(server, short, rate, 2 * seconds, turn))
        for server in servers:
            run("bulk", server, closed(server, bulk, 1, seconds))
    for server in servers:
        if server.name == "ours":
            run("full", server, full(server))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--servers", nargs="+", default=["ours", "fastapi"])
    parser.add_argument("--server-cores", type=int, nargs="+", default=[0])
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-process", action="store_true", help="also the libraries without a server")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        serve_peer(options.model, options.peer, options.threads)
        return
    results: dict[str, object] = {}
    if options.in_process:
        os.sched_setaffinity(0, options.server_cores)
        results["direct"] = direct(options.model, options.seconds)
        threads = len(options.server_cores)
        results["encode"] = direct_sentence_transformers(options.model, threads, mixed_texts(256), options.seconds)
        print(json.dumps(results))
    os.sched_setaffinity(0, [options.client_core])
    servers: list[Server] = []
    try:
        for name in options.servers:
            servers.append(Server(name, options.model, options.server_cores))
        found = measure(servers, options.rounds, options.seconds)
    finally:
        for server in servers:
            server.stop()
    print("\nmedians")
    for what, by_server in found.items():
        for name, rounds in by_server.items():
            medians = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
            print(f"{what:12} {name:12} " + "  ".join(f"{key} {value:.2f}" for key, value in medians.items()))
    if options.json:
        versions = {name: _version(name) for name in ("jax", "sentence-transformers", "torch", "fastapi", "uvicorn")}
        content = {"machine": platform.processor(), "versions": versions, **results, "results": found}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
