"""Commands for tokenizers: tokenize, tokenizer train, tokenizer inspect."""

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from prelm_jax.cli.options import Cased, Choice, Chosen, Positional, TextFile, TokenizerPath, suggestion
from prelm_jax.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from prelm_jax.tokenizers.base import Tokenizer, TokenizerConfig

KINDS = {
    "wordpiece": "WordPiece (BERT): subwords; ## before each that continues a word",
    "bpe": "byte-pair encoding (GPT-1): subwords; </w> after each that ends a word",
    "sentencepiece": "SentencePiece (unigram or BPE): subwords of raw text, for languages without spaces too",
    "words": "whole words, most frequent first (ELMo's output vocabulary)",
}


def tokenize(tokenizer: TokenizerPath, input: TextFile, cased: Cased = False) -> None:
    """Print the ids of each line of a text file as a JSON list, without special tokens."""
    from prelm_jax.storage import stream_lines
    from prelm_jax.tokenizers.load import load

    for ids in load(tokenizer, lowercase=not cased).encode_each(stream_lines(input)):
        print(json.dumps(ids))


def _choose(kind: str) -> Chosen:
    from prelm_jax.tokenizers.bpe import BPEConfig
    from prelm_jax.tokenizers.sentencepiece import SentencePieceConfig
    from prelm_jax.tokenizers.wordpiece import WordPieceConfig
    from prelm_jax.tokenizers.words import WordVocabularyConfig

    classes = (WordPieceConfig, BPEConfig, SentencePieceConfig, WordVocabularyConfig)
    configs = dict(zip(KINDS, classes, strict=True))
    if kind not in configs:
        raise InputError(f"there is no tokenizer {kind!r}.{suggestion(kind, KINDS)} There are {', '.join(KINDS)}.")
    return Chosen(kind, configs[kind](), inspect.getdoc(configs[kind]) or "")


def _catalog() -> str:
    return "\n".join(["kinds:", *(f"  {kind:14} {description}" for kind, description in KINDS.items())])


KIND = Choice(
    name="kind",
    help="Kind of tokenizer. Followed by --help, the options of that kind.",
    choose=_choose,
    catalog=_catalog,
)


def train(config: Annotated["TokenizerConfig", KIND], directory: Positional[Path], corpus: tuple[str, ...]) -> None:
    """Train a tokenizer on a corpus and write its files.

    Args:
        directory: New or empty directory to write, in the format that `transformers` reads (words: a vocab.txt).
        corpus: Sources of text: python-docs, or paths, globs and tfds: names, each with its options.
    """
    from prelm_jax.corpus.documents import Corpus
    from prelm_jax.storage import output_directory
    from prelm_jax.tokenizers.build import build

    with output_directory(directory) as written:
        tokenizer = build(config, Corpus(corpus))
        tokenizer.save(written)
    print(f"wrote {directory}: {tokenizer.vocab_size:,} tokens")


def inspect_tokenizer(tokenizer: TokenizerPath, input: Positional[Path | None] = None, cased: Cased = False) -> None:
    """Describe a tokenizer; with a text file, its bytes per token and the lines with most unknown tokens.

    Args:
        input: Text file in UTF-8, one text per line.
    """
    from prelm_jax.report.summary import print_table
    from prelm_jax.storage import read_lines
    from prelm_jax.tokenizers.load import load

    lines = None if input is None else read_lines(input)
    print_table(tokenizer_table(load(tokenizer, lowercase=not cased), lines))


def tokenizer_table(tokenizer: "Tokenizer", lines: list[str] | None) -> "Table":
    """A table of the facts of a tokenizer and, with lines of text, statistics of their tokens."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False)
    table.add_row("kind", type(tokenizer).__name__)
    table.add_row("tokens in the vocabulary", f"{tokenizer.vocab_size:,}")
    special = ", ".join(f"{token} {index}" for token, index in tokenizer.special_ids.items())
    table.add_row("special tokens", escape(special))
    table.add_row("lowercases", "yes" if tokenizer.lowercase else "no")
    table.add_row("longest tokens", escape("  ".join(sorted(tokenizer.tokens, key=len, reverse=True)[:5])))
    if lines is not None:
        encoded = tokenizer.encode_batch(lines)
        unknown = [0 if tokenizer.unknown_id is None else ids.count(tokenizer.unknown_id) for ids in encoded]
        tokens = sum(map(len, encoded))
        table.add_section()
        table.add_row("tokens", f"{tokens:,}")
        table.add_row("bytes per token", f"{sum(len(line.encode()) for line in lines) / max(1, tokens):.3f}")
        table.add_row("tokens per word", f"{tokens / max(1, sum(len(line.split()) for line in lines)):.3f}")
        table.add_row("unknown tokens", f"{sum(unknown) / max(1, tokens):.2%}")
        for i in sorted(range(len(lines)), key=unknown.__getitem__, reverse=True)[:5]:
            if unknown[i]:
                table.add_row(f"line {i + 1}: {unknown[i]} unknown", escape(lines[i][:200]))
    return table
