"""Checkpoints: asynchronous, with a checksum for every array. The only importer of Orbax."""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, TypeVar

import jax
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from prelm_jax.errors import InputError, first_line
from prelm_jax.storage import is_remote
from prelm_jax.training.checksums import checksums_by_name
from prelm_jax.training.contract import Params
from prelm_jax.training.parameters import path_name

FORMAT = 3
DELETING_SECONDS = 1.0  # A trainer needs less to delete a checkpoint.

Tree = TypeVar("Tree")
Step = int | Literal["newest", "best"]


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint records about its training.

    evaluation_loss: of the evaluation at this step, if there was one.
    scheduled: False if only SIGTERM made the save due; such a checkpoint is deleted at the next save, so that a resumed
        run keeps the same checkpoints as an uninterrupted one.
    """

    tokens_seen: int = 0
    evaluation_loss: float | None = None
    scheduled: bool = True


class _Damaged(Exception):
    """The checkpoint cannot be read, or an array differs from its checksum."""

    def __init__(self, path: epath.Path, reason: str):
        super().__init__(f"checkpoint {path} is damaged ({reason})")


class _Gone(Exception):
    """A trainer has deleted the checkpoint that was about to be read, or has saved a newer one: list again."""


@contextlib.contextmanager
def _reading(path: epath.Path, reason: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # A damaged file makes Orbax raise anything.
        if isinstance(error, PermissionError) or "PERMISSION_DENIED" in str(error):  # TensorStore raises ValueErrors.
            raise InputError(f"cannot read the checkpoint {path}: permission denied") from error
        raise _Damaged(path, reason) from error


@contextlib.contextmanager
def _writing(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # A full disk makes Orbax raise anything.
        raise InputError(
            f"cannot write the checkpoint {path} ({first_line(error)}); earlier ones are intact: free some space and "
            "run the same command to resume"
        ) from error


class _Directory:
    """The checkpoints `<path>/<step>`. The directory is created by the first save.

    It is listed each time, and read file by file: a trainer may save and delete while others read. Only saving is left
    to Orbax's Checkpointer, which cannot list a directory with a damaged checkpoint in it.
    """

    def __init__(self, path: epath.Path):
        self.path = path
        self._checkpointer = None
        self._absolute = path if is_remote(path) else path.absolute()  # Orbax takes no other.

    @property
    def steps(self) -> list[int]:
        """The steps of complete checkpoints. Other files and directories are ignored."""
        try:
            names = [path.name for path in self.path.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or error}") from None
        steps = sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))
        return [step for step in steps if self._is_complete(self.path / str(step))]

    def _is_complete(self, path: epath.Path) -> bool:
        # In a bucket directories cannot be renamed: there Orbax writes a file at the end.
        return (path / "commit_success.txt").exists() if is_remote(path) else path.is_dir()

    def metadata(self, step: int) -> dict:
        """`format`; `checksums`, by item and array; `record`, the fields of the Record."""
        path = self.path / str(step)
        with _reading(path, "its file _CHECKPOINT_METADATA is missing, or not what was written"):
            metadata = json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
            # These raise if a field is missing or of another type; of another format only the number is known.
            if int(metadata["format"]) == FORMAT:
                Record(**metadata["record"])
                {int(x) for arrays in metadata["checksums"].values() for x in arrays.values()}
            return metadata

    def save(self, step: int, items: Mapping[str, object], record: Record) -> ocp.AsyncResponse[bool] | None:
        if self._checkpointer is None:
            for known in self.steps:
                try:
                    self.metadata(known)
                except _Damaged as error:
                    print(f"{error}: moved to {self.put_aside(known, str(error))}", file=sys.stderr)
            self._checkpointer = ocp.training.Checkpointer(self._absolute, cleanup_tmp_directories=True)
        sums = {item: checksums_by_name(tree) for item, tree in items.items()}
        metadata: dict = {"format": FORMAT, "checksums": sums, "record": dataclasses.asdict(record)}
        return self._checkpointer.save_checkpointables_async(
            step, dict(items), force=True, overwrite=step in self.steps, custom_metadata=metadata
        )

    def load(self, step: int, items: Mapping[str, Tree]) -> dict[str, Tree]:
        """The items of a checkpoint. Raises _Damaged, or InputError for another format or other arrays."""
        path, metadata = self.path / str(step), self.metadata(step)
        saved_format = int(metadata["format"])
        if saved_format != FORMAT:
            older = saved_format < FORMAT
            remedy = "use that version, or start in another --workdir" if older else "upgrade this one"
            raise InputError(
                f"{path} was written by {'an earlier' if older else 'a later'} version of prelm_jax (format "
                f"{saved_format}, not {FORMAT}): {remedy}"
            )
        saved = metadata["checksums"]
        for item, tree in items.items():
            if item not in saved:
                raise InputError(f"{path} holds no {item}, only {', '.join(saved)}: choose another --step")
            names = {path_name(name) for name, _ in jax.tree_util.tree_leaves_with_path(tree)}
            if differing := names ^ saved[item].keys():
                raise InputError(f"{path} is of another model or optimizer: {item}/{min(differing)} is only in one")
        with _reading(path, "files of its arrays are missing, or not what was written"):
            loaded = ocp.load_checkpointables(self._absolute / str(step), dict(items))
        for item, tree in loaded.items():
            for name, checksum in checksums_by_name(tree).items():
                if saved[item][name] != checksum:
                    raise _Damaged(path, f"the checksum of {item}/{name} differs")
        return loaded

    def put_aside(self, step: int, complaint: str) -> epath.Path:
        """Moves a damaged checkpoint to `<path>.damaged`, with the complaint in a text file; returns its new path."""
        aside = self.path.parent / f"{self.path.name}.damaged"
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            (aside / f"{step}.txt").write_text(f"{complaint}\n")  # In a bucket this makes the directory, too.
            (self.path / str(step)).rename(aside / str(step))
        multihost_utils.sync_global_devices("put aside")  # Nobody lists the directory earlier.
        return aside / str(step)

    def delete(self, step: int) -> None:
        """Deletes a checkpoint. It disappears as a whole: Orbax would delete its files one by one."""
        if jax.process_index() != 0:
            return
        path = doomed = self.path / str(step)
        with contextlib.suppress(FileNotFoundError):
            if is_remote(path):
                (path / "commit_success.txt").unlink()
            else:
                # Orbax removes directories of such a name: after a kill, the rest of this one.
                doomed = path.rename(self.path / f"{step}.orbax-checkpoint-tmp-deleted")
            doomed.rmtree()

    def close(self) -> None:
        if self._checkpointer is not None:
            with contextlib.suppress(Exception):  # It raises again what a failed save has raised before.
                self._checkpointer.close()


class Checkpoints:
    """The checkpoints of a training: full ones in `<directory>/<step>`, parameters alone in `<directory>.kept/<step>`.

    keep: number of newest full checkpoints to keep, in addition to the one with the lowest evaluation loss; what
        `keep_parameters` saves is never deleted. None: for reading. A reader never creates, moves or deletes anything,
        so another process may be writing.
    before_write: called before each save and deletion, and after a save that failed; its exceptions take precedence.

        step, items = Checkpoints("run/checkpoints").restore({"params": abstract_params}, step="best")
    """

    def __init__(
        self, directory: epath.PathLike, keep: int | None = None, before_write: Callable[[], None] = lambda: None
    ):
        self.directory, self._keep, self._before_write = epath.Path(directory), keep, before_write
        self._full = _Directory(self.directory)
        self._kept = _Directory(self.directory.parent / f"{self.directory.name}.kept")
        self._saving = None
        self._read_records()

    def _read_records(self) -> None:
        self._records: dict[int, Record] = {}
        for step in self._full.steps:
            with contextlib.suppress(Exception):  # Restoring the checkpoint tells what is wrong.
                self._records[step] = Record(**self._full.metadata(step)["record"])

    def save(self, step: int, items: Mapping[str, object], record: Record = Record()) -> None:
        """Starts to save; waits only for the save before, whose errors this call raises."""
        self.wait()
        self._records[step] = record
        self._save(self._full, step, items, record)

    def keep_parameters(self, step: int, items: Mapping[str, object], record: Record = Record()) -> None:
        """Starts to save a checkpoint without the item `opt_state`, which is never deleted."""
        self.wait()
        self._save(self._kept, step, {item: tree for item, tree in items.items() if item != "opt_state"}, record)

    def _save(self, directory: _Directory, step: int, items: Mapping[str, object], record: Record) -> None:
        path = directory.path / str(step)
        self._before_write()
        with _writing(path):
            self._saving = (path, directory.save(step, items, record))

    def wait(self) -> None:
        """Waits until the current save, if any, is on disk; InputError if it cannot be written."""
        if self._saving is not None:
            (path, saving), self._saving = self._saving, None
            with _writing(path):
                try:
                    saving.result()
                finally:
                    self._before_write()  # A process that has taken over may be why it failed.
                self._delete_superfluous()

    def _delete_superfluous(self) -> None:
        """Deletes full checkpoints, oldest first, except the newest scheduled ones, the newest of all, and the best."""
        if self._keep is None or not (steps := self._full.steps):
            return
        scheduled = [step for step in steps if self._record(step).scheduled]
        kept = {*scheduled[-self._keep :], steps[-1], self.best_step}
        self._records = {step: record for step, record in self._records.items() if step in kept}
        for step in steps:
            if step not in kept:
                self._full.delete(step)

    def close(self) -> None:
        """Waits, and releases what Orbax holds."""
        try:
            self.wait()
        finally:
            self._full.close()
            self._kept.close()

    @property
    def best_step(self) -> int | None:
        """The step of the full checkpoint with the lowest evaluation loss; None if none was evaluated."""
        return min(self._losses(), default=(math.inf, None))[1]

    def improves(self, evaluation_loss: float) -> bool:
        """Whether this loss is lower than that of every full checkpoint."""
        return evaluation_loss < min(self._losses(), default=(math.inf, None))[0]

    def evaluated(self, step: int) -> bool:
        """Whether the model was evaluated at the step of a full checkpoint."""
        return self._record(step).evaluation_loss is not None

    def tokens_seen(self, step: int) -> int:
        """The number of tokens trained on up to a checkpoint; 0 if the step has none."""
        if step not in self._records and step in self._kept.steps:
            with contextlib.suppress(Exception):  # Restoring the checkpoint tells what is wrong.
                return Record(**self._kept.metadata(step)["record"]).tokens_seen
        return self._record(step).tokens_seen

    def _record(self, step: int) -> Record:
        return self._records.get(step, Record())

    def _losses(self) -> list[tuple[float, int]]:
        return [(x.evaluation_loss, step) for step, x in self._records.items() if x.evaluation_loss is not None]

    def restore(self, items: Mapping[str, Tree], step: Step = "newest") -> tuple[int, dict[str, Tree]] | None:
        """(step, items) of one checkpoint: of a step, the best, or the newest intact one.

        With "newest" a damaged checkpoint is reported on stderr and the one before is used, while a writer moves the
        damaged one to `<directory>.damaged`; the result is None if there is no checkpoint.

        Args:
            items: by name the trees wanted, of jax.ShapeDtypeStruct with shardings.
            step: which checkpoint.

        Raises:
            InputError: for a step without a checkpoint, for a checkpoint that may not be read, has other items, arrays
                or another format, and for a damaged one if there is no other.
        """
        while True:
            try:
                return self._restore(items, step)
            except _Gone:
                self._read_records()

    def _restore(self, items: Mapping[str, Tree], step: Step) -> tuple[int, dict[str, Tree]] | None:
        if step != "newest":
            step, directory = self._find(step)
            try:
                return step, self._load(directory, step, items)
            except _Damaged as error:
                raise InputError(f"{error}: choose a --step: {self._listing()}") from error
        directories = {} if "opt_state" in items else dict.fromkeys(self._kept.steps, self._kept)
        directories |= dict.fromkeys(self._full.steps, self._full)
        newest = max(directories, default=0)
        for step in sorted(directories, reverse=True):
            directory = directories[step]
            try:
                return step, self._load(directory, step, items, newest)
            except _Damaged as error:
                complaint = str(error)
            self._records.pop(step, None)
            done = "skipped" if self._keep is None else f"moved to {directory.put_aside(step, complaint)}"
            print(f"{complaint}: {done}", file=sys.stderr)
        if directories:
            raise InputError(f"{self.directory}: all {len(directories)} checkpoints are damaged; use another --workdir")
        return None

    def _load(
        self, directory: _Directory, step: int, items: Mapping[str, Tree], newest: float = math.inf
    ) -> dict[str, Tree]:
        """The items of a checkpoint. Raises _Gone if a trainer deleted it, or saved one after `newest`, meanwhile."""
        try:
            return directory.load(step, items)
        except _Damaged:
            deadline = time.monotonic() + DELETING_SECONDS
            while self._keep is None and time.monotonic() < deadline:
                if step not in directory.steps or max(self._full.steps, default=0) > newest:
                    raise _Gone from None
                time.sleep(0.05)
            raise

    def _find(self, step: int | Literal["best"]) -> tuple[int, _Directory]:
        best = self.best_step
        if step == "best" and best is not None:
            return best, self._full
        for directory in (self._full, self._kept):
            if step in directory.steps:
                return int(step), directory
        missing = "evaluated checkpoint" if step == "best" else f"checkpoint of step {step}"
        raise InputError(f"{self.directory}: no {missing}; choose a --step: {self._listing()}")

    def _listing(self) -> str:
        """`5, 10 (best), 12`"""
        best = self.best_step
        steps = sorted({*self._full.steps, *self._kept.steps})
        return ", ".join(f"{step} (best)" if step == best else str(step) for step in steps) or "there is none yet"


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
