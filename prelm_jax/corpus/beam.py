"""The shards of a corpus made by Apache Beam, on one machine or many (extra `beam`).

The stages are those of `prelm_jax.corpus.prepare`: parts → shards → one file each. All machines must see the files of
the corpus and the cache directory under the same names. The process that runs the pipeline merges the shards.
"""

import dataclasses
from pathlib import Path

from prelm_jax.corpus.documents import Corpus
from prelm_jax.corpus.prepare import MakeShards, make_shard
from prelm_jax.errors import InputError
from prelm_jax.tokenizers.base import Tokenizer


def make_shards_with(options: list[str]) -> MakeShards:
    """Makes shards with a Beam runner; `options` are Beam's own, for example `--runner=FlinkRunner`.

    Raises InputError if Beam is not installed, and when shards are made if it does not know the runner.
    """
    try:
        import apache_beam as beam  # pyrefly: ignore[missing-import]  # It conflicts with the extra `test`.
    except ImportError:
        raise InputError('--beam needs Apache Beam: pip install "prelm_jax[beam]"') from None

    def make_shards(corpus: Corpus, tokenizer: Tokenizer, directory: Path) -> None:
        parts = list(enumerate(corpus.parts))
        bare = dataclasses.replace(corpus)  # Without cached properties: workers get their parts one at a time.
        try:
            pipeline = beam.Pipeline(argv=options)
        except ValueError as error:
            raise InputError(f"--beam {' '.join(options)}: {error}") from None
        with pipeline:
            (
                pipeline
                | "parts" >> beam.Create(parts)
                | "shards" >> beam.FlatMap(lambda numbered: bare.shards(*numbered))
                | "spread" >> beam.Reshuffle()
                | "tokenize" >> beam.Map(lambda shard: make_shard(shard, bare, tokenizer, directory))
            )

    return make_shards
