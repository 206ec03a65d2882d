"""Checkpoints: asynchronous, the last few kept, every array with a checksum. The only importer of Orbax."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from prelm_jax.errors import InputError
from prelm_jax.storage import is_remote
from prelm_jax.training.parameters import path_name

FORMAT = 2

Tree = Any


@jax.jit
def checksums(tree: Tree) -> Tree:
    """A uint32 for each array, which changes if any one bit of it does; the same on any mesh.

    The sum, modulo 2^32, of the array's 32-bit words, each times an odd number made from its index: a flipped bit
    changes the sum by a power of two times an odd number, which is never zero. Integer sums have no order, so shards
    are added up wherever they lie.
    """

    def checksum(x: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
        odd = jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B2) + jnp.uint32(1)
        return (words * odd).sum(dtype=jnp.uint32)

    return jax.tree.map(checksum, tree)


def _first_line(error: Exception) -> str:
    line = (str(error) or type(error).__name__).splitlines()[0]
    return line if len(line) <= 400 else f"{line[:200]} … {line[-200:]}"


def _named(tree: Tree) -> dict[str, int]:
    sums, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(checksums(tree)))
    return {path_name(path): int(value) for path, value in sums}


class Checkpoints:
    """The checkpoints under a directory, `<directory>/<step>`; parameters apart, so that they can be read alone.

    `keep`: how many of the newest to keep. None: only read (another process may be writing).
    """

    def __init__(self, directory: epath.PathLike, keep: int | None = None):
        self.directory = epath.Path(directory)
        self._checkpointer = ocp.training.Checkpointer(
            self.directory if is_remote(directory) else self.directory.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=keep is not None,
        )
        self._saving = None

    def save(self, step: int, items: dict[str, Tree]) -> None:
        """Starts to save; waits only for a save that is still going on, whose errors come with this call."""
        self.settle()
        metadata = {"format": FORMAT, "checksums": {item: _named(tree) for item, tree in items.items()}}
        with self._writing(step):
            saving = self._checkpointer.save_checkpointables_async(step, items, custom_metadata=metadata)
        self._saving = (step, saving)

    def settle(self) -> None:
        """Waits until the save that is going on, if any, is on disk; InputError if it cannot be written."""
        if self._saving is not None:
            (step, saving), self._saving = self._saving, None
            with self._writing(step):
                saving.result()

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Whatever a full disk makes Orbax raise.
            raise InputError(
                f"cannot write the checkpoint {self.directory / str(step)} ({_first_line(error)}); those before it are "
                "whole: make room, and the same command goes on"
            ) from error

    def close(self) -> None:
        """Settles, and releases what Orbax holds."""
        self.settle()
        with contextlib.suppress(Exception):  # It raises again what a failed save has raised before.
            self._checkpointer.close()

    def restore(self, items: dict[str, Tree]) -> tuple[int, dict[str, Tree]] | None:
        """(step, items) of the newest checkpoint that is whole, or None where there is none.

        `items` names the trees wanted, of jax.ShapeDtypeStruct with shardings. A checkpoint that cannot be read, or
        whose checksums differ, is named on stderr and put aside in `<directory>.damaged`.
        """
        damaged = []
        for checkpoint in reversed(self._checkpointer.checkpoints):
            path = self.directory / str(checkpoint.step)
            try:
                recorded = self._checkpointer.metadata(checkpoint.step).custom_metadata
                saved_format, saved_checksums = recorded["format"], recorded["checksums"]
                if saved_format == FORMAT:
                    loaded = self._checkpointer.load_checkpointables(checkpoint.step, items)
            except Exception as error:  # Whatever a damaged file makes the reader raise.
                complaint = _first_line(error)
            else:
                if saved_format != FORMAT:
                    raise InputError(
                        f"{path} has format {saved_format}, not {FORMAT}: upgrade prelm_jax, or if it is newer than "
                        "what wrote this, read it with that"
                    )
                differing = [
                    f"{item}/{name}"
                    for item, tree in loaded.items()
                    for name, checksum in _named(tree).items()
                    if saved_checksums[item].get(name) != checksum
                ]
                if not differing:
                    return checkpoint.step, loaded
                complaint = f"the checksum of {differing[0]} differs"
            print(f"checkpoint {path} is damaged ({complaint}): put aside", file=sys.stderr)
            damaged.append(path)
            aside = self.directory.parent / f"{self.directory.name}.damaged"
            if jax.process_index() == 0:
                aside.mkdir(exist_ok=True)
                (aside / f"{path.name}.txt").write_text(f"{complaint}\n")  # In a bucket it makes the directory, too.
                path.rename(aside / path.name)
            multihost_utils.sync_global_devices("put aside")  # Nobody lists the directory before.
            self._checkpointer.reload()
        if damaged:
            raise InputError(
                f"{self.directory}: none of {len(damaged)} checkpoints is whole; start in another --workdir"
            )
        return None


def restore_params(directory: epath.PathLike, abstract_params: Tree) -> tuple[int, Tree]:
    """(step, parameters) of the newest whole checkpoint under `directory`, on the first device.

    `abstract_params`: their tree, of jax.ShapeDtypeStruct.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract_params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract_params)
    restored = None
    if epath.Path(directory).is_dir():
        with contextlib.closing(Checkpoints(directory)) as checkpoints:
            restored = checkpoints.restore({"params": abstract_params})
    if restored is None:
        raise InputError(f"{directory}: no checkpoint here yet")
    step, items = restored
    return step, items["params"]
