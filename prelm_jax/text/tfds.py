"""TensorFlow Datasets as documents, without TensorFlow: any prepared dataset with a feature `text` is read, and one is
written from a corpus."""

import os
import re
from collections.abc import Iterator
from typing import Any

from prelm_jax.errors import InputError
from prelm_jax.text.files import Advance, nonblank


def _library():
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise InputError('tfds: needs TensorFlow Datasets: pip install "prelm_jax[tfds]"') from None
    return tfds


def split(spec: str) -> tuple[Any, list[str]]:
    """The records of `tfds:name/config[:version][:split]` and the paths of the files that hold them."""
    name, split = re.fullmatch(r"tfds:([^:]*(?::\d+\.\d+\.\d+)?)(?::(.*))?", spec).groups()
    tfds = _library()
    try:
        builder = tfds.builder(name)
        records = builder.as_data_source(split=split or "train")
        paths = [os.fspath(path) for path in builder.info.splits[split or "train"].filepaths]
    except (ValueError, RuntimeError, AssertionError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{spec}: {reason} (looked in {tfds.core.constants.DATA_DIR}; set TFDS_DATA_DIR)") from error
    if "text" not in builder.info.features:
        raise InputError(f"{spec} has no feature `text`, only {', '.join(builder.info.features)}")
    return records, paths


def texts(spec: str, advance: Advance) -> Iterator[str]:
    records, paths = split(spec)
    record_bytes = sum(map(os.path.getsize, paths)) / max(len(records), 1)
    for index in range(len(records)):
        try:
            text = records[index]["text"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{spec}: record {index} is not UTF-8 at byte {error.start}") from None
        yield from nonblank(text.replace("\r\n", "\n"))
        advance(record_bytes)


def builder(corpus: Any, name: str, data_dir: str | os.PathLike | None = None):
    """A TFDS builder whose `download_and_prepare()` writes the corpus as the dataset `name` (ArrayRecord, `train`).

    Both sides are written, in order; whoever reads `tfds:name` with the same held-out fraction finds the same documents
    on the same sides, because their text decides. TensorFlow is not needed, neither to write nor to read.
    """
    tfds = _library()
    with tfds.core.registered.skip_registration():  # a dataset that is read from its files, not from this class

        class Text(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            # No downloads; to look for their checksums, TFDS 4.9.10 would import a package that it does not require.
            url_infos = None

            def _info(self):
                features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
                return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for index, document in enumerate(corpus.documents()):
                    yield index, {"text": document.text}

    Text.name = name
    return Text(data_dir=data_dir, file_format="array_record")
