"""The shards of a corpus made by Apache Beam, on one machine or many (extra `beam`).

The stages are those of `prelm_jax.corpus.prepare`: parts → shards → one file each. All machines must see the files of
the corpus and the cache directory under the same names. The store is put together where the command was given.
"""

import dataclasses
from pathlib import Path

from prelm_jax.corpus.documents import Corpus
from prelm_jax.corpus.prepare import MakeShards, make_shard
from prelm_jax.errors import InputError
from prelm_jax.tokenizers.base import Tokenizer


def make_shards_with(options: list[str]) -> MakeShards:
    """What makes shards with a runner; `options` are Beam's own, `--runner=FlinkRunner` for example.

    Raises InputError where Beam is not installed, and later, for a runner that Beam does not have.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise InputError('--beam needs Apache Beam: pip install "prelm_jax[beam]"') from None

    def make_shards(corpus: Corpus, tokenizer: Tokenizer, directory: Path) -> None:
        parts = list(enumerate(corpus.parts))
        bare = dataclasses.replace(corpus)  # The parts go to the workers one by one.
        try:
            pipeline = beam.Pipeline(options=PipelineOptions(options))
        except ValueError as error:
            raise InputError(f"--beam {' '.join(options)}: {error}") from None
        with pipeline:
            (
                pipeline
                | "parts" >> beam.Create(parts)
                | "shards" >> beam.FlatMap(lambda numbered: bare.shards(*numbered))
                | "spread" >> beam.Reshuffle()
                | "tokenise" >> beam.Map(lambda shard: make_shard(shard, bare, tokenizer, directory))
            )

    return make_shards
