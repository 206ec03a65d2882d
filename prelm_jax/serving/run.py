"""Starts the HTTP server, then loads the model in a thread, so that /health answers from the beginning."""

import asyncio
import dataclasses
import ipaddress
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import jax

from prelm_jax.cache import cache_compiled_programs
from prelm_jax.errors import InputError
from prelm_jax.inference.pooling import MODES, Pooling, parse_modes
from prelm_jax.loading import load
from prelm_jax.serving.app import make_app
from prelm_jax.serving.batcher import Batcher
from prelm_jax.serving.connections import in_url, make_server
from prelm_jax.serving.model import ServedModel
from prelm_jax.serving.service import Service
from prelm_jax.storage import kind_of_file
from prelm_jax.training.checkpoint import Step


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `prelm serve`."""

    model: str
    step: Step = "newest"
    host: str = "127.0.0.1"
    port: int = 8000
    uds: Path | None = None
    key_file: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    name: str | None = None
    pooling: str | None = None
    layers: tuple[int, ...] = ()
    normalize: bool | None = None
    max_queue_tokens: int = 131072


def run(options: Options) -> None:
    """Serves until SIGTERM or SIGINT. Raises InputError if the model cannot be loaded."""
    key = read_key(options.key_file)
    if options.uds is None and not is_loopback(options.host) and key is None:
        raise InputError(f"--host {options.host}: others could use the model; give --key-file, or serve at 127.0.0.1")
    name = options.name or os.path.basename(os.path.abspath(options.model))  # Of "." too.
    service = Service(name, key)
    app = make_app(service, {"localhost", "127.0.0.1", "[::1]", *map(in_url, (options.host, *options.allowed_hosts))})
    failures: list[Exception] = []

    def load_model() -> None:
        try:
            start(service, options)
        except Exception as error:
            failures.append(error)
            server.should_exit = True

    def on_start(addresses: Sequence[str]) -> None:
        print(f"prelm: serving {name} at {', '.join(addresses)}", file=sys.stderr, flush=True)
        threading.Thread(target=load_model, name="load", daemon=True).start()

    def on_stop() -> None:
        if service.batcher is not None:
            service.batcher.stop_warming()

    raise_file_limit()
    listener = listen(options)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # After the server's own handlers, which end it in an orderly way.
    server = make_server(app, on_start, on_stop)
    asyncio.run(server.serve([listener]))
    if options.uds is not None:
        options.uds.unlink(missing_ok=True)
    is_idle = service.batcher is None or service.batcher.stop()
    if failures:
        raise failures[0]
    if not is_idle:  # A thread still compiles a program; nobody needs it.
        sys.stderr.flush()
        os._exit(0)


def listen(options: Options) -> socket.socket:
    """A socket that is bound to the address of the options. Raises InputError if that fails."""
    if options.uds is not None:
        found, previous = socket.socket(socket.AF_UNIX), os.umask(0o177)  # For the user alone.
        try:
            if is_abandoned(options.uds):
                options.uds.unlink()
            found.bind(str(options.uds))
        except OSError as error:
            found.close()
            raise InputError(f"--uds {options.uds}: {error.strerror or error}; another server, or a file?") from None
        finally:
            os.umask(previous)
        return found
    try:
        ((family, *_, address), *_) = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:  # UnicodeError for a..b, which cannot be a host.
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen at {options.host}:{options.port} (--host, --port): {reason}") from None


def is_abandoned(path: Path) -> bool:
    """Whether a path is the socket of a server that was killed."""
    if kind_of_file(path) != "socket":
        return False
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return True
    return False


def start(service: Service, options: Options) -> None:
    """Loads the model, and starts to compile its programs."""
    cache_compiled_programs()
    model = load(options.model, options.step)
    served = ServedModel(model, service.name)
    served.pooling = choose_pooling(options, served.pooling)
    service.start(served, Batcher(jax.local_devices(), options.max_queue_tokens))


def choose_pooling(options: Options, own: Pooling) -> Pooling:
    """The pooling of the options, or else the directory's (`own`). Its dense layers fit no other pooling."""
    normalize = own.normalize if options.normalize is None else options.normalize
    if options.pooling is None and not options.layers:
        return dataclasses.replace(own, normalize=normalize)
    modes = own.modes if options.pooling is None else parse_modes(options.pooling)
    if modes is None:
        raise InputError(f"--pooling {options.pooling}: give one of {', '.join(MODES)}, or different ones joined by +")
    return Pooling(modes, options.layers or own.layers, normalize=normalize)


def read_key(path: Path | None) -> str | None:
    """The key in a file; None without a file. Raises InputError for a key that is too short or not ASCII."""
    if path is None:
        return None
    try:
        key = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--key-file {path}: {error}") from None
    if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"--key-file {path}: a key has at least 16 characters, printable ASCII without spaces")
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def raise_file_limit() -> None:
    """Raises the limit on open files, and so on connections, to the system's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else 65536, hard))
