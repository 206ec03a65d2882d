"""The tokenizer that a configuration asks for: loaded, cached or trained."""

from pathlib import Path

from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError
from prelm_jax.tokenizers.base import Tokenizer, TokenizerConfig
from prelm_jax.tokenizers.load import load
from prelm_jax.tokenizers.wordpiece import WordPieceConfig
from prelm_jax.tokenizers.words import WordVocabulary, WordVocabularyConfig, check_order, count


def build(config: TokenizerConfig, corpus: Corpus) -> Tokenizer:
    """The tokenizer at the configuration's `path`, or without one a tokenizer trained on the corpus (cached).

    A subword configuration may load any kind of subwords. Raises InputError if it loads a vocabulary of words, or the
    other way around, and if a vocabulary of words is not sorted by falling count, which sampled softmax relies on.

    Example: `build(WordPieceConfig(vocab_size=8192), Corpus(("corpus.txt",)))`
    """
    if config.path is None:
        return config.build(corpus)
    path = Path(config.path).expanduser()
    if isinstance(config, WordVocabularyConfig):
        read = WordVocabulary.from_directory if path.is_dir() else WordVocabulary.from_vocab
        words = read(path, config.tokenize, config.lowercase)
        check_order(words.tokens, count(corpus, words.tokenize, words.lowercase), path)
        return words
    if isinstance(config, WordPieceConfig):
        return load_subwords(path, config.lowercase, config.strip_accents)
    return load_subwords(path)


def load_subwords(path: Path, lowercase: bool = True, strip_accents: bool | None = None) -> Tokenizer:
    """Like `load`. Raises InputError for a vocabulary of words."""
    tokenizer = load(path, lowercase, strip_accents)
    if tokenizer.open_vocabulary:
        raise InputError(f"{path} is a vocabulary of words, for ELMo: give one of subwords with --tokenizer.path")
    return tokenizer
