"""Setup of all tests: eight fake devices, warnings are errors, no implicit broadcasting, shared compiled programs."""

import collections
import contextlib
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Also for the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Tests spend most of their time in the compiler; without optimization it takes half as long.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis
import jax
import numpy as np

# Other programs slow the examples down too.
hypothesis.settings.register_profile("without deadline", deadline=None)
hypothesis.settings.load_profile("without deadline")

jax.config.update("jax_numpy_rank_promotion", "raise")

PRELM_DATA = Path(os.environ.get("PRELM_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()


@pytest.fixture(scope="session")
def common_directory(tmp_path_factory) -> Path:
    """A temporary directory that all test processes share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory, common_directory) -> Iterator[None]:
    """A cache for tests instead of the user's; all test processes and their children share its compiled programs."""
    programs = common_directory / "xla"
    programs.mkdir(exist_ok=True)
    cache = tmp_path_factory.mktemp("cache")
    (cache / "xla").symlink_to(programs)  # The command line keeps compiled programs there.
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRELM_CACHE", str(cache))
        yield


@pytest.fixture(scope="module")
def shared_programs() -> Iterator[None]:
    """Runs of equal configurations in a module share their traced and compiled programs, for these are pure."""
    from prelm_jax.training import step

    def shared(make: Callable) -> Callable:
        made = {}

        def get(*args: object) -> object:
            shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args)]
            key = repr((args, shardings, jax.sharding.get_mesh()))
            if key not in made:
                made[key] = make(*args)
            return made[key]

        return get

    with pytest.MonkeyPatch.context() as patch:
        for name in ("abstract_state", "make_init", "make_train_step", "make_evaluate"):
            original = getattr(step, name)
            remembered = shared(original)
            for module in list(sys.modules.values()):
                if getattr(module, name, None) is original:
                    patch.setattr(module, name, remembered)
        yield


def pytest_terminal_summary(terminalreporter) -> None:
    """Reports the time of each folder and file of tests: seconds of all workers together, and their share."""
    seconds = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds["/".join(report.nodeid.partition("::")[0].split("/")[:2])] += report.duration
    if len(seconds) > 1:
        terminalreporter.section("time by room")
        for room, time in seconds.most_common():
            terminalreporter.line(f"{time:8.1f} s {time / seconds.total():6.1%}  {room}")


@pytest.fixture
def real_data():
    """The folder of real corpora and vocabularies; skips the test if there is none."""
    if not PRELM_DATA.is_dir():
        pytest.skip(f"no real data at {PRELM_DATA}; set PRELM_DATA")
    return PRELM_DATA


@pytest.fixture
def write(tmp_path):
    """Writes a file and returns its path: `write(name, content)`."""

    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.fixture
def full_disk():
    """`with full_disk(size):` no file can grow beyond `size` bytes."""

    @contextlib.contextmanager
    def full_disk(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return full_disk


@pytest.fixture
def free_port() -> int:
    """An unused port of this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def tiny_bert():
    """A BERT that compiles in a second or two."""
    from prelm_jax.models.bert import BertConfig

    return BertConfig(
        vocab_size=120, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_position_embeddings=32
    )


@pytest.fixture(scope="session")
def tiny_gpt():
    """A GPT that compiles in a second or two."""
    from prelm_jax.models.gpt import GPTConfig

    return GPTConfig(vocab_size=120, hidden_size=32, num_layers=2, num_heads=2, max_position_embeddings=32)


@pytest.fixture(scope="session")
def random_gpt_batch():
    """`(step, rows) -> batch` of random tokens in two segments, with padding and positions that are not predicted."""

    def batch(step: int = 0, rows: int = 8, length: int = 16) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(step)
        lengths_B1 = rng.integers(length // 2, length + 1, (rows, 1))
        columns_BT = np.broadcast_to(np.arange(length), (rows, length))
        real_BT, second_BT = columns_BT < lengths_B1, columns_BT >= lengths_B1 // 2
        integers = {
            "tokens": np.where(real_BT, rng.integers(1, 120, (rows, length)), 0),
            "targets": np.where(real_BT, rng.integers(1, 120, (rows, length)), 0),
            "positions": np.where(real_BT, columns_BT - second_BT * (lengths_B1 // 2), 0),
            "segments": np.where(real_BT, 1 + second_BT, 0),
        }
        weights_BT = (real_BT & (rng.random((rows, length)) < 0.9)).astype(np.float32)
        return {name: array.astype(np.int32) for name, array in integers.items()} | {"weights": weights_BT}

    return batch


@pytest.fixture(scope="session")
def random_bert_batch():
    """`(step, rows) -> batch` of random tokens, with padding, unequal numbers of masks, and both labels."""

    def batch(step: int = 0, rows: int = 8, length: int = 16, masked: int = 4) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(step)
        lengths_B1 = rng.integers(length // 2, length + 1, (rows, 1))
        columns_BT = np.broadcast_to(np.arange(length), (rows, length))
        real_BT = columns_BT < lengths_B1
        count_B1 = rng.integers(1, masked + 1, (rows, 1))
        weights_BM = (np.arange(masked) < count_B1).astype(np.float32)
        integers = {
            "tokens": np.where(real_BT, rng.integers(5, 120, (rows, length)), 0),
            "token_types": real_BT & (columns_BT >= lengths_B1 // 2),
            "positions": columns_BT,
            "segments": real_BT,
            "masked_positions": np.sort(rng.permuted(np.tile(np.arange(length // 2), (rows, 1)), axis=1)[:, :masked]),
            "masked_targets": rng.integers(5, 120, (rows, masked)),
            "next_sentence_positions": np.zeros((rows, 1)),
            "next_sentence_labels": rng.integers(0, 2, (rows, 1)),
        }
        weights = {"masked_weights": weights_BM, "next_sentence_weights": np.ones((rows, 1), np.float32)}
        return {name: array.astype(np.int32) for name, array in integers.items()} | weights

    return batch
