"""TensorFlow Datasets as documents, read without TensorFlow: any prepared dataset that has a text feature."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from prelm_jax.corpus.readers import Errors, as_document, decode
from prelm_jax.errors import InputError, first_line
from prelm_jax.progress import Advance


def open_split(spec: str, field: str) -> tuple[Sequence[Mapping[str, object]], list[str]]:
    """The records of `tfds:name/config[:version][:split]` and the paths of the files that hold them.

    Raises InputError for a dataset that is not prepared on this machine, or has no feature `field`.
    """
    import tensorflow_datasets as tfds  # Here: a second to import.

    name, _, split = spec.removeprefix("tfds:").partition(":")
    if split[:1].isdigit():
        version, _, split = split.partition(":")
        name = f"{name}:{version}"
    split = split or "train"
    try:
        try:
            builder = tfds.core.read_only_builder.builder_from_files(name)
        except tfds.core.registered.DatasetNotFoundError:
            builder = tfds.builder(name)  # Imports the code of the dataset, all of TFDS's with it: many seconds.
        records = builder.as_data_source(split=split)
        paths = [os.fspath(path) for path in builder.info.splits[split].filepaths]
    except (ValueError, RuntimeError, AssertionError, OSError) as error:
        looked = f"looked in {tfds.core.constants.DATA_DIR}; set TFDS_DATA_DIR"
        raise InputError(f"{spec}: {first_line(error)} ({looked})") from error
    if field not in builder.info.features:
        raise InputError(f"{spec} has no feature `{field}`, only {', '.join(builder.info.features)}")
    return cast(Sequence[Mapping[str, object]], records), paths


def texts(spec: str, field: str, numbers: range, errors: Errors, advance: Advance) -> Iterator[str]:
    """The documents in the records with these numbers."""
    records, paths = open_split(spec, field)
    record_bytes = sum(map(os.path.getsize, paths)) / len(records)
    for number in numbers:
        data = records[number][field]
        if not isinstance(data, bytes):
            raise InputError(f"{spec}: the feature `{field}` is not text")
        yield from as_document(decode(f"{spec}: record {number}", 0, data, errors))
        advance(record_bytes)
