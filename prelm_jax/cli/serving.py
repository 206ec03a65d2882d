"""The command that serves a model over HTTP."""

from pathlib import Path
from typing import Annotated

from prelm_jax.bounds import Bounds
from prelm_jax.cli.options import ModelPath, Step
from prelm_jax.errors import InputError

Port = Annotated[int, Bounds(0, 65535)]


def serve(
    model: ModelPath,
    host: str = "127.0.0.1",
    port: Port = 8000,
    uds: Path | None = None,
    key_file: Path | None = None,
    allowed_host: tuple[str, ...] = (),
    name: str | None = None,
    pooling: str | None = None,
    layer: tuple[int, ...] = (),
    normalize: bool | None = None,
    max_queue_tokens: Annotated[int, Bounds(512, 2**31 - 1)] = 131072,
    step: Step = "newest",
) -> None:
    """Serve a model over HTTP: vectors, filled masks, scores, completions, and a page to try it.

    Only this machine can connect, unless --host says otherwise. The routes are in docs/serving.md.

    Args:
        host: Address to listen at. Another one than the default needs --key-file.
        port: Port to listen at; 0: any free one, which is printed.
        uds: Unix socket to listen at instead.
        key_file: File with the key that clients send as a bearer token; without one, none is asked for.
        allowed_host: Further names of this server that clients may use, such as that of a proxy.
        name: Name of the model in answers; if unset, that of its directory.
        pooling: mean, cls, max, last, mean-sqrt or weighted-mean, several joined by +; if unset, what the directory
            says, or mean.
        layer: Layer to pool, from 0 (embeddings) or back from -1 (last); several are concatenated.
        normalize: Scale vectors to length 1; if unset, as the directory says, or not.
        max_queue_tokens: Tokens that may wait, padding included; more are refused with 429.
    """
    try:
        from prelm_jax.serving.run import Options, run
    except ImportError as error:
        raise InputError(f"prelm serve needs {error.name}: pip install 'prelm_jax[serve]'") from None

    address = host, port, uds
    run(Options(model, step, *address, key_file, allowed_host, name, pooling, layer, normalize, max_queue_tokens))
