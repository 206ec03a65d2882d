"""TensorFlow Datasets as documents, without TensorFlow: any prepared dataset with a feature of text is read, and one is
written from a corpus."""

import os
import re
from collections.abc import Iterator
from typing import Any

from prelm_jax.corpus.readers import Errors, as_document, decode
from prelm_jax.errors import InputError
from prelm_jax.progress import Advance


def _library():
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise InputError('tfds: needs TensorFlow Datasets: pip install "prelm_jax[tfds]"') from None
    return tfds


def split(spec: str, field: str) -> tuple[Any, list[str]]:
    """The records of `tfds:name/config[:version][:split]` and the paths of the files that hold them."""
    name, split = re.fullmatch(r"tfds:([^:]*(?::\d+\.\d+\.\d+)?)(?::(.*))?", spec).groups()
    tfds = _library()
    try:
        builder = _prepared(tfds, name) or tfds.builder(name)
        records = builder.as_data_source(split=split or "train")
        paths = [os.fspath(path) for path in builder.info.splits[split or "train"].filepaths]
    except (ValueError, RuntimeError, AssertionError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{spec}: {reason} (looked in {tfds.core.constants.DATA_DIR}; set TFDS_DATA_DIR)") from error
    if field not in builder.info.features:
        raise InputError(f"{spec} has no feature `{field}`, only {', '.join(builder.info.features)}")
    return records, paths


def _prepared(tfds: Any, name: str) -> Any:
    """The dataset, if its files are there. TFDS itself looks for its code first, a second and longer in all it has."""
    try:
        return tfds.core.read_only_builder.builder_from_files(name)
    except tfds.core.registered.DatasetNotFoundError:
        return None


def texts(spec: str, field: str, numbers: range, errors: Errors, advance: Advance) -> Iterator[str]:
    """The documents in the records of some numbers."""
    records, paths = split(spec, field)
    record_bytes = sum(map(os.path.getsize, paths)) / len(records)
    for number in numbers:
        data = records[number][field]
        if not isinstance(data, bytes):
            raise InputError(f"{spec}: the feature `{field}` is not text")
        yield from as_document(decode(f"{spec}: record {number}", 0, data, errors))
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
