"""Checkpoints: asynchronous, with a checksum for every array. The only importer of Orbax."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypedDict, TypeVar, cast

import jax
import jax.numpy as jnp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from prelm_jax.errors import InputError
from prelm_jax.storage import is_remote
from prelm_jax.training.contract import Params
from prelm_jax.training.parameters import path_name

FORMAT = 3

Tree = TypeVar("Tree")
Step = int | Literal["newest", "best"]


@jax.jit
def checksums(tree: Tree) -> Tree:
    """A uint32 for each array, which changes if any one bit of the array does; the same on any mesh.

    The sum, modulo 2^32, of the array's 32-bit words, each times an odd number made from its index: a flipped bit
    changes the sum by a power of two times an odd number, which is never zero. Integer sums have no order, so shards
    may be added in any.
    """

    def checksum(x: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
        odd = jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B2) + jnp.uint32(1)
        return (words * odd).sum(dtype=jnp.uint32)

    return jax.tree.map(checksum, tree)


def _checksums_by_name(tree: object) -> dict[str, int]:
    sums, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(checksums(tree)))
    return {path_name(path): int(value) for path, value in sums}


def _first_line(error: Exception) -> str:
    line = (str(error) or type(error).__name__).splitlines()[0]
    return line if len(line) <= 400 else f"{line[:200]} … {line[-200:]}"


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint tells about its training.

    evaluation_loss: of the evaluation at this step, if there was one.
    scheduled: False if only SIGTERM made the save due; such a checkpoint is deleted at the next save, so that a resumed
        run keeps the same checkpoints as an uninterrupted one.
    """

    tokens_seen: int = 0
    evaluation_loss: float | None = None
    scheduled: bool = True


class _Metadata(TypedDict):
    """The JSON of a checkpoint: its format, the checksums by item and array, and the fields of its Record."""

    format: int
    checksums: dict[str, dict[str, int]]
    tokens_seen: int
    evaluation_loss: float | None
    scheduled: bool


class _Damaged(Exception):
    """The checkpoint cannot be read, or an array differs from its checksum."""


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # A damaged file makes Orbax raise anything.
        raise _Damaged(_first_line(error)) from error


class _Directory:
    """The checkpoints `<path>/<step>`; created by the first save. `keep` None keeps all of them."""

    def __init__(self, path: epath.Path, keep: int | None, writable: bool):
        self.path, self._keep, self._writable = path, keep, writable
        self.records: dict[int, Record | None] = {}  # None: unreadable, or of another format.
        self._checkpointer = None
        if path.is_dir():
            self._open()

    def _open(self) -> ocp.training.Checkpointer:
        if self._checkpointer is None:
            self._checkpointer = ocp.training.Checkpointer(
                self.path if is_remote(self.path) else self.path.absolute(),
                preservation_policy=self,
                cleanup_tmp_directories=self._writable,
            )
            self._read_records()
        return self._checkpointer

    def _read_records(self) -> None:
        self.records = dict.fromkeys(checkpoint.step for checkpoint in self._open().checkpoints)
        for step in self.records:
            with contextlib.suppress(Exception):  # Loading it tells what is wrong.
                metadata = self._metadata(step)
                tokens_seen, loss = metadata["tokens_seen"], metadata["evaluation_loss"]
                self.records[step] = Record(tokens_seen, loss, metadata["scheduled"])

    def _metadata(self, step: int) -> _Metadata:
        return cast(_Metadata, self._open().metadata(step).custom_metadata)

    def best(self) -> tuple[float, int]:
        """(evaluation loss, step) of the best checkpoint; an infinite loss if none was evaluated."""
        losses = [(x.evaluation_loss, step) for step, x in self.records.items() if x and x.evaluation_loss is not None]
        return min(losses, default=(math.inf, -1))

    def should_preserve(
        self,
        checkpoints: Sequence[ocp.training.CheckpointMetadata],
        *,
        context: ocp.training.preservation_policies.PreservationContext,
    ) -> Sequence[bool]:
        """For each checkpoint, oldest first, whether it is kept. Orbax asks at each save."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        if self._keep is None:
            return [True] * len(steps)
        scheduled = [step for step in steps if (record := self.records.get(step)) is None or record.scheduled]
        kept = {*scheduled[-self._keep :], steps[-1], self.best()[1]}
        return [step in kept for step in steps]

    def save(self, step: int, items: Mapping[str, object], record: Record):
        """Starts to save; the caller waits for the result."""
        checkpointer = self._open()
        metadata = {
            "format": FORMAT,
            "checksums": {name: _checksums_by_name(tree) for name, tree in items.items()},
            **dataclasses.asdict(record),
        }
        overwrite = step in self.records
        self.records[step] = record
        saving = checkpointer.save_checkpointables_async(
            step, dict(items), force=True, overwrite=overwrite, custom_metadata=cast(dict, metadata)
        )
        kept = {checkpoint.step for checkpoint in checkpointer.checkpoints}
        self.records = {step: record for step, record in self.records.items() if step in kept}
        return saving

    def load(self, step: int, items: Mapping[str, Tree]) -> dict[str, Tree]:
        """The items of a checkpoint; raises _Damaged, or InputError if it has another format or not all items."""
        path = self.path / str(step)
        with _reading():
            metadata = self._metadata(step)
            saved_format, saved_sums = metadata["format"], metadata["checksums"]
        if saved_format != FORMAT:
            older = saved_format < FORMAT
            remedy = "use that version, or start in another --workdir" if older else "upgrade this one"
            raise InputError(
                f"{path} was written by {'an earlier' if older else 'a later'} version of prelm_jax (format "
                f"{saved_format}, not {FORMAT}): {remedy}"
            )
        if missing := [item for item in items if item not in saved_sums]:
            raise InputError(
                f"{path} holds no {', '.join(missing)}, only {', '.join(saved_sums)}: choose another --step"
            )
        with _reading():
            loaded = self._open().load_checkpointables(step, dict(items))
        for item, tree in loaded.items():
            for name, checksum in _checksums_by_name(tree).items():
                if saved_sums[item].get(name) != checksum:
                    raise _Damaged(f"the checksum of {item}/{name} differs")
        return loaded

    def put_aside(self, step: int, complaint: str) -> epath.Path:
        """Moves a damaged checkpoint to `<path>.damaged`, with a note; returns its new path."""
        aside = self.path.parent / f"{self.path.name}.damaged"
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            (aside / f"{step}.txt").write_text(f"{complaint}\n")  # In a bucket this makes the directory, too.
            (self.path / str(step)).rename(aside / str(step))
        multihost_utils.sync_global_devices("put aside")  # Nobody lists the directory earlier.
        self._open().reload()
        self._read_records()
        return aside / str(step)

    def close(self) -> None:
        if self._checkpointer is not None:
            with contextlib.suppress(Exception):  # It raises again what a failed save has raised before.
                self._checkpointer.close()


class Checkpoints:
    """The checkpoints of a training: full ones in `<directory>/<step>`, parameters alone in `<directory>.kept/<step>`.

    keep: number of newest full checkpoints to keep, in addition to the one with the lowest evaluation loss; what
        `keep_parameters` saves is never deleted. None: for reading. A reader never creates, moves or deletes anything,
        so another process may be writing.

        step, items = Checkpoints("run/checkpoints").restore({"params": abstract_params}, step="best")
    """

    def __init__(self, directory: epath.PathLike, keep: int | None = None):
        self.directory = epath.Path(directory)
        self._writable = keep is not None
        self._full = _Directory(self.directory, keep, self._writable)
        kept = self.directory.parent / f"{self.directory.name}.kept"
        self._kept = _Directory(kept, None, self._writable)
        self._saving = None

    def save(self, step: int, items: Mapping[str, object], record: Record = Record()) -> None:
        """Starts to save; waits only for the save before, whose errors this call raises."""
        self._save(self._full, step, items, record)

    def keep_parameters(self, step: int, items: Mapping[str, object], record: Record = Record()) -> None:
        """The same for a checkpoint without the item `opt_state`, to keep forever."""
        self._save(self._kept, step, {name: tree for name, tree in items.items() if name != "opt_state"}, record)

    def _save(self, directory: _Directory, step: int, items: Mapping[str, object], record: Record) -> None:
        self.wait()
        path = directory.path / str(step)
        with _writing(path):
            self._saving = (path, directory.save(step, items, record))

    def wait(self) -> None:
        """Waits until the current save, if any, is on disk; InputError if it cannot be written."""
        if self._saving is not None:
            (path, saving), self._saving = self._saving, None
            with _writing(path):
                saving.result()

    def close(self) -> None:
        """Waits, and releases what Orbax holds."""
        self.wait()
        self._full.close()
        self._kept.close()

    def improves(self, evaluation_loss: float) -> bool:
        """Whether this loss is lower than that of every full checkpoint."""
        return evaluation_loss < self._full.best()[0]

    def tokens_seen(self, step: int) -> int:
        """The tokens seen by the training up to a full checkpoint; 0 if there is none of that step."""
        record = self._full.records.get(step)
        return record.tokens_seen if record else 0

    def restore(self, items: Mapping[str, Tree], step: Step = "newest") -> tuple[int, dict[str, Tree]] | None:
        """(step, items) of one checkpoint: the newest intact one, the best, or that of a step.

        None if `step` is "newest" and there is no checkpoint. A damaged checkpoint is reported on stderr and the one
        before is used; a writer moves it to `<directory>.damaged`.

        Args:
            items: by name the trees wanted, of jax.ShapeDtypeStruct with shardings.
            step: which checkpoint.

        Raises:
            InputError: for a step without a checkpoint, a checkpoint without one of the items or of another format, or
                a damaged checkpoint without an intact one before it.
        """
        if step != "newest":
            step, directory = self._find(step)
            try:
                return step, directory.load(step, items)
            except _Damaged as error:
                raise InputError(
                    f"checkpoint {directory.path / str(step)} is damaged ({error}): choose another --step; there are "
                    f"{self._listing()}"
                ) from error
        directories = dict.fromkeys([] if "opt_state" in items else self._kept.records, self._kept)
        directories |= dict.fromkeys(self._full.records, self._full)
        for step in sorted(directories, reverse=True):
            directory = directories[step]
            try:
                return step, directory.load(step, items)
            except _Damaged as error:
                complaint = f"checkpoint {directory.path / str(step)} is damaged ({error})"
            done = f"moved to {directory.put_aside(step, complaint)}" if self._writable else "skipped"
            print(f"{complaint}: {done}", file=sys.stderr)
        if directories:
            raise InputError(
                f"{self.directory}: all {len(directories)} checkpoints are damaged; start in another --workdir"
            )
        return None

    def _find(self, step: int | Literal["best"]) -> tuple[int, _Directory]:
        if step == "best":
            _, best = self._full.best()
            if best in self._full.records:
                return best, self._full
            raise InputError(f"{self.directory}: no checkpoint was evaluated; choose a --step: {self._listing()}")
        for directory in (self._full, self._kept):
            if step in directory.records:
                return step, directory
        raise InputError(f"{self.directory}: no checkpoint of step {step}; choose a --step: {self._listing()}")

    def _listing(self) -> str:
        """`5, 10 (best), 12`"""
        best = self._full.best()[1]
        steps = sorted({*self._full.records, *self._kept.records})
        return ", ".join(f"{step} (best)" if step == best else str(step) for step in steps) or "there is none yet"


@contextlib.contextmanager
def _writing(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # A full disk makes Orbax raise anything.
        raise InputError(
            f"cannot write the checkpoint {path} ({_first_line(error)}); earlier ones are intact: free some space and "
            "run the same command to resume"
        ) from error


def restore_params(directory: epath.PathLike, abstract_params: Params, step: Step = "newest") -> tuple[int, Params]:
    """(step, parameters) of a checkpoint under `directory` on the first device; see `Checkpoints.restore`.

    `abstract_params`: their tree, of jax.ShapeDtypeStruct. Raises InputError if there is no checkpoint.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract_params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract_params)
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        restored = checkpoints.restore({"params": abstract_params}, step)
    if restored is None:
        raise InputError(f"{directory}: no checkpoint here yet")
    step, items = restored
    return step, items["params"]
