"""TensorFlow Datasets as documents, read without TensorFlow: any prepared dataset that has a text feature."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import numpy as np

from prelm_jax.corpus.readers import Errors, as_document, class_name, decode
from prelm_jax.errors import InputError, first_line
from prelm_jax.progress import Advance
from prelm_jax.storage import decode_utf8


def open_split(spec: str, field: str) -> tuple[Sequence[Mapping[str, object]], list[str]]:
    """The records of `tfds:name/config[:version][:split]` and the paths of the files that hold them.

    Raises InputError for a dataset that is not prepared on this machine, or has no feature `field`.
    """
    records, paths, _ = _open(spec, [field])
    return records, paths


def labelled_records(spec: str, fields: Sequence[str]) -> Iterator[dict[str, object]]:
    """The records of a split with these features: text as str, arrays as lists, classes by name (None: no label)."""
    records, _, classes = _open(spec, fields)
    for number, record in enumerate(records):
        where = f"{spec}: record {number}"
        yield {name: class_name(_plain(where, record[name]), classes.get(name, ())) for name in fields}


def _plain(where: str, value: object) -> object:
    """A value without NumPy's types."""
    if isinstance(value, bytes):
        return decode_utf8(where, 0, value)
    if isinstance(value, dict):
        return {name: _plain(where, each) for name, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(where, value.tolist())
    return [_plain(where, each) for each in value] if isinstance(value, list) else value


def _open(spec: str, fields: Sequence[str]) -> tuple[Sequence[Mapping[str, object]], list[str], dict[str, list[str]]]:
    """The records of a split, the paths of its files, and the names of the classes of each feature that has some."""
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
    features = builder.info.features
    if missing := [field for field in fields if field not in features]:
        raise InputError(f"{spec} has no feature `{missing[0]}`, only {', '.join(features)}")
    items = {field: getattr(features[field], "feature", features[field]) for field in fields}
    classes = {field: item.names for field, item in items.items() if isinstance(item, tfds.features.ClassLabel)}
    return cast(Sequence[Mapping[str, object]], records), paths, classes


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
