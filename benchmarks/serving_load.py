"""10,000 requests of 64 clients to `prelm serve`, each answer compared with that of its text alone; kills and stops.

    python benchmarks/serving_load.py MODEL [--requests 10000] [--clients 64] [--devices 1] [--texts 40]

Texts of mixed lengths are asked for alone first, kind by kind. Then come requests of all kinds that the model answers,
for one or several of these texts, some of which leave before their answer, and hostile ones. The answer for each text
must have the same bits as alone, each request its own answer and no other, and memory must stay what it was. Then come
attacks over raw sockets, all at once, with the status and the time of each. At last the server is killed and started
again, and then stopped, while clients ask.
"""

import argparse
import asyncio
import base64
import collections
import dataclasses
import itertools
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from serving import WORDS, Connection, Server, post

STOPS_AFTER = 10.0  # Seconds.


@dataclasses.dataclass(frozen=True)
class Kind:
    """Requests of a kind: the body for some texts, and the parts of an answer that belong to each."""

    verb: str
    path: str
    body: Callable[[Sequence[str]], dict[str, object]]
    parts: Callable[[dict], list[object]]
    most: int = 4  # Texts of a request.


def kind(verb: str, path: str, name: str = "texts", parts: str = "results", most: int = 4, **options: object) -> Kind:
    def without_index(answer: dict) -> list[object]:
        return [{key: value for key, value in each.items() if key != "index"} for each in answer[parts]]

    return Kind(verb, path, lambda texts: {name: texts, **options}, without_index, most)


OTHERS = ["a river", "the green house of a woman"]
KINDS = [
    kind("embed", "/v1/embeddings", "input", "data", encoding_format="base64"),
    kind("embed", "/embed", most=40),
    kind("embed", "/embed", pooling="none", layers=[0, -1]),
    Kind("similarity", "/similarity", lambda texts: {"texts": texts, "others": OTHERS}, lambda each: each["cosines"]),
    kind("tokenize", "/tokenize"),
    kind("fill", "/fill", top_k=3),
    kind("score", "/score", most=2),
    kind("complete", "/v1/completions", "prompt", "choices", 2, max_tokens=6, seed=5, logprobs=2, echo=True),
    kind("complete", "/v1/completions", "prompt", "choices", 2, max_tokens=6, seed=7, temperature=0.5, stop="e"),
]


def hostile(info: dict) -> list[tuple[int, str, bytes]]:
    """Bodies that are refused: (status, path, body)."""

    def body(**fields: object) -> bytes:
        return json.dumps(fields).encode()

    return [
        (400, "/embed", b'{"texts": ["half'),
        (400, "/embed", b'{"texts": "\xff\xfe"}'),
        (400, "/embed", b'{"a":' * 100_000),
        (400, "/embed", b"[" * 500_000),
        (400, "/embed", b'{"texts": NaN}'),
        (400, "/embed", body(texts=[["a"], 1, None])),
        (400, "/embed", body(texts="a", truncate="yes", layers={})),
        (400, "/embed", body(texts=["a"] * 3000)),
        (400, "/embed", body(texts="the " * (info["max_tokens"] + 1))),
        (400, "/embed", body(texts="x" * 400 * info["max_tokens"])),
        (400, "/v1/embeddings", body(input=[[10**9]])),
        (400, "/v1/embeddings", body(input={"a": 1}, model=info["model"])),
        (404, "/v1/embeddings", body(input="a", model="another")),
        (404, "/nowhere", b"{}"),
        (404, "/classify", body(texts="a")),
        (405, "/info", b"{}"),
    ]


def pool(count: int, most: int) -> list[str]:
    """Texts of log-normal lengths, up to `most` words."""
    rng = random.Random(0)
    lengths = (min(most, max(1, round(rng.lognormvariate(2.5, 1)))) for _ in range(count))
    return [" ".join(rng.choices(WORDS, k=length)) for length in lengths]


class Load:
    """Requests of all kinds, and the answers for each text alone."""

    def __init__(self, server: Server, info: dict, texts: Sequence[str]):
        self.server, self.texts = server, list(texts)
        self.kinds = [kind for kind in KINDS if kind.verb in info["verbs"]]
        self.mask = info["mask"]
        self.hostile = hostile(info)
        self.alone: dict[tuple[int, str], object] = {}
        self.counts: collections.Counter[str] = collections.Counter()

    def given(self, kind: Kind, text: str) -> str:
        return f"{text} {self.mask} river" if kind.verb == "fill" else text

    async def ask_alone(self) -> None:
        client = Connection(self.server.port)
        for number, kind in enumerate(self.kinds):
            for text in self.texts:
                body = json.dumps(kind.body([self.given(kind, text)])).encode()
                status, _, answer = await client.ask(post(kind.path, body))
                assert status == 200, answer
                (self.alone[number, text],) = kind.parts(json.loads(answer))
        client.close()

    async def run(self, requests: int, clients: int) -> None:
        numbers = iter(range(requests))
        await asyncio.gather(*(self._client(numbers) for _ in range(clients)))

    async def _client(self, numbers: Iterator[int]) -> None:
        client = Connection(self.server.port)
        for number in numbers:
            rng = random.Random(number)
            what = rng.random()
            if what < 0.08:
                await self._be_hostile(client, number, rng)
            else:
                await self._ask(client, number, rng, leaves=what < 0.18)
        client.close()

    async def _be_hostile(self, client: Connection, number: int, rng: random.Random) -> None:
        expected, path, body = rng.choice(self.hostile)
        status, headers, answer = await client.ask(post(path, body, number))
        assert status == expected and "error" in json.loads(answer), (path, body[:80], status, answer)
        assert status in (404, 405) or headers["x-request-id"] == str(number)
        self.counts[f"refused {status}"] += 1

    async def _ask(self, client: Connection, number: int, rng: random.Random, leaves: bool) -> None:
        which = rng.randrange(len(self.kinds))
        kind = self.kinds[which]
        texts = rng.choices(self.texts, k=rng.choice([1, 1, 1, rng.randint(1, kind.most)]))
        body = json.dumps(kind.body([self.given(kind, text) for text in texts])).encode()
        await client.send(post(kind.path, body, number))
        if leaves:
            await asyncio.sleep(rng.random() * 0.05)
            client.close()
            self.counts["left"] += 1
            return
        status, headers, answer = await client.receive()
        assert status == 200, (status, answer)
        assert headers["x-request-id"] == str(number)
        parts = kind.parts(json.loads(answer))
        assert parts == [self.alone[which, text] for text in texts], (kind.path, texts)
        self.counts["answered"] += 1
        self.counts["texts"] += len(texts)


async def compare_with_library(load: Load, model: str) -> int:
    """Checks that the server's vectors equal the library's; returns how many were compared."""
    import prelm_jax

    vectors = prelm_jax.load(model).vectors(load.texts)
    for text, vector in zip(load.texts, vectors, strict=True):
        coded = load.alone[0, text]
        assert isinstance(coded, dict) and base64.b64decode(coded["embedding"]) == vector.tobytes()
    return len(load.texts)


POST = b"POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
ATTACKS = {  # What is sent, and by how many bytes in a third of a second; None: at once.
    "a header of 64 MB": (GET + b"x: " + b"y" * 2**26, None),
    "100,000 headers": (GET + b"x: y\r\n" * 100_000, None),
    "a path of 1 MB": (b"GET /" + b"x" * 2**20, None),
    "no Host": (b"GET /health HTTP/1.1\r\n\r\n", None),
    "two Hosts": (GET + b"host: localhost\r\n\r\n", None),
    "another Host": (b"GET /health HTTP/1.1\r\nhost: evil.example\r\n\r\n", None),
    "length and chunks": (POST + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", None),
    "two lengths": (POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}", None),
    "a length of -1": (POST + b"content-length: -1\r\n\r\n{}", None),
    "a length of 10^20": (POST + b"content-length: 100000000000000000000\r\n\r\n{}", None),
    "a body of 50 MB": (POST + b"content-length: 50000000\r\n\r\n" + b" " * 50_000_000, None),
    "chunks of 50 MB": (
        POST + b"transfer-encoding: chunked\r\n\r\n" + (b"f4240\r\n" + b" " * 10**6 + b"\r\n") * 50,
        None,
    ),
    "binary": (bytes(range(256)) * 4, None),
    "silence": (b"", None),
    "half a request line": (b"GET /hea", None),
    "half a body": (POST + b"content-length: 100\r\n\r\n{", None),
    "a byte every third of a second": (GET + b"x: " + b"y" * 10_000, 1),
    "silence after a request": (GET + b"\r\n", None),
}


async def attack(port: int, sent: bytes, at_once: int | None) -> tuple[str, float, float]:
    """The status of the answer, "none" without one, the seconds until it came, and those until the server closed."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**26)
    received, answered = b"", float("nan")

    async def send() -> None:
        for i in range(0, len(sent), at_once or 2**16):
            writer.write(sent[i : i + (at_once or 2**16)])
            await writer.drain()
            await asyncio.sleep(0.3 if at_once else 0)

    async with asyncio.timeout(120):
        sending = asyncio.create_task(send())
        try:
            while chunk := await reader.read(2**16):
                answered = answered if received else time.monotonic() - began
                received += chunk
        except ConnectionError:
            pass
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.close()
    return (received[9:12].decode() or "none"), answered, time.monotonic() - began


async def attack_all(server: Server) -> None:
    found = await asyncio.gather(*(attack(server.port, *each) for each in ATTACKS.values()))
    print(f"attacks at once ({server.memory():.0f} MB after them):")
    for name, (status, answered, closed) in zip(ATTACKS, found, strict=True):
        print(f"  {name:32} {status:6} after {answered:5.2f} s, closed after {closed:5.1f} s")


@dataclasses.dataclass
class Seen:
    """What a client saw of a request."""

    sent: float
    done: float
    result: str


async def ask_on(load: Load, clients: int, seen: list[Seen]) -> AsyncIterator[None]:
    """Clients that ask on and on, whatever happens, until this is closed."""
    requests = [json.dumps(load.kinds[1].body([text])).encode() for text in load.texts]

    async def client(first: int) -> None:
        own = Connection(load.server.port)
        for body in itertools.islice(itertools.cycle(requests), first, None):
            sent = time.monotonic()
            try:
                result = str((await own.ask(post(load.kinds[1].path, body)))[0])
            except (OSError, asyncio.IncompleteReadError) as error:
                result = type(error).__name__
                own.close()
                await asyncio.sleep(0.05)
            seen.append(Seen(sent, time.monotonic(), result))

    tasks = [asyncio.create_task(client(i)) for i in range(clients)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def print_seen(seen: Sequence[Seen], since: float) -> None:
    counts = collections.Counter((("before", "after")[each.done > since], each.result) for each in seen)
    for (when, result), count in sorted(counts.items()):
        print(f"  {when:6} {result:24} {count}")


async def kill_and_restart(load: Load, clients: int) -> None:
    """kill -9 while clients ask; they try again and again."""
    seen: list[Seen] = []
    async for _ in ask_on(load, clients, seen):
        await asyncio.sleep(2)
        load.server.process.kill()
        load.server.process.wait()
        killed = time.monotonic()
        load.server.start()
        await load.server.ready()
        await asyncio.sleep(1)
        break
    print("kill -9 and restart:")
    print_seen(seen, killed)
    first = min(each.done for each in seen if each.done > killed and each.result == "200")
    print(f"  the first answer came {first - killed:.1f} s after the kill")


async def stop(load: Load, clients: int) -> None:
    """SIGTERM while clients ask; some are silent."""
    seen: list[Seen] = []
    silent = [await asyncio.open_connection("127.0.0.1", load.server.port) for _ in range(20)]
    async for _ in ask_on(load, clients, seen):
        await asyncio.sleep(2)
        load.server.process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        while load.server.process.poll() is None:
            assert time.monotonic() - told < 2 * STOPS_AFTER, "it does not end"
            await asyncio.sleep(0.01)
        ended = time.monotonic()
        await asyncio.sleep(0.1)
        break
    for _, writer in silent:
        writer.close()
    print(f"SIGTERM: ended with {load.server.process.returncode} after {ended - told:.2f} s")
    print_seen(seen, told)
    waiting = [each for each in seen if each.sent < told < each.done]
    answered = sum(each.result == "200" for each in waiting)
    print(f"  of {len(waiting)} requests that waited for their answers {answered} were answered")
    assert load.server.process.returncode == 0 and ended - told < STOPS_AFTER
    assert all(each.result == "200" for each in waiting if each.sent < told - 0.1)


async def main_async(options: argparse.Namespace) -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"
    server = Server("ours", options.model)
    try:
        await server.ready()
        await server.idle()
        info = json.loads((await server.get("/info"))[1])
        load = Load(server, info, pool(options.texts, min(150, info["max_vector_tokens"] // 2)))
        began = time.monotonic()
        await load.ask_alone()
        print(f"{len(load.alone)} answers alone in {time.monotonic() - began:.1f} s", flush=True)
        print(f"{await compare_with_library(load, options.model)} vectors have the bits of the library's", flush=True)
        await load.run(options.requests // 10, options.clients)  # What a server needs once.
        load.counts.clear()
        before, began = server.memory(), time.monotonic()
        for part in range(1, 5):
            await load.run(options.requests // 4, options.clients)
            memory = server.memory()
            print(
                f"after {part * options.requests // 4} requests {memory:.0f} MB, {memory / before:.3f} of before",
                flush=True,
            )
        print(f"{time.monotonic() - began:.1f} s: {dict(sorted(load.counts.items()))}")
        while b"\nprelm_queue_tokens 0\n" not in (metrics := (await server.get("/metrics"))[1]):
            await asyncio.sleep(0.1)
        print("statuses:", statuses(metrics.decode()))
        info = json.loads((await server.get("/info"))[1])
        print("exact:", info["exact"], "devices:", info["devices"])
        assert b'status="500"' not in metrics and info["exact"]
        await attack_all(server)
        await kill_and_restart(load, 16)
        await stop(load, options.clients)
    finally:
        server.process.kill()
        server.process.wait()


def statuses(metrics: str) -> dict[str, int]:
    """The requests by status, as the server counted them."""
    found: collections.Counter[str] = collections.Counter()
    for line in metrics.splitlines():
        if line.startswith("prelm_requests_total{"):
            found[line.partition('status="')[2][:3]] += int(float(line.split()[-1]))
    return dict(sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--devices", type=int, default=1, help="of the CPU, virtual ones")
    parser.add_argument("--texts", type=int, default=40, help="different ones")
    asyncio.run(main_async(parser.parse_args()))


if __name__ == "__main__":
    main()
