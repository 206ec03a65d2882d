"""The comparison of the three families: similar sizes, the same lower-cased text, and no next-sentence labels.

Without vocabulary tables and softmax, the models have 3.2 to 3.3 million parameters, the small ones 0.41 to 0.45. The
learning rate is constant after the warm-up, so that a cool-down can branch off any checkpoint: `examples/comparison.py`
trains such branches, and docs/study.md explains them.
Each public function returns a Run: `prelm pretrain study:bert --help` explains it and lists its options.
"""

import math

from prelm_jax.data.masking import MaskingConfig
from prelm_jax.data.pairs import PairsConfig
from prelm_jax.data.streams import StreamsConfig
from prelm_jax.data.windows import WindowsConfig
from prelm_jax.models.bert import BertConfig
from prelm_jax.models.elmo import ELMoConfig
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.run import Run
from prelm_jax.tokenizers.bpe import BPEConfig
from prelm_jax.tokenizers.wordpiece import WordPieceConfig
from prelm_jax.tokenizers.words import WordVocabularyConfig
from prelm_jax.training.loop import LoopConfig
from prelm_jax.training.muon import Muon


def bert() -> Run:
    """BERT of the comparison: 4 layers of 256, 30 % of tokens masked, packed rows of whole sentences without pairs.

    Target: results to compare with `gpt1` and `elmo` at equal words and at equal FLOPs.
    Cost: 20 minutes on two CPU cores.

        prelm pretrain study:bert --corpus simplewiki.txt.xz
    """
    return _bert(hidden_size=256, num_layers=4, vocab_size=8192, batch_size=64, steps=1500)


def gpt1() -> Run:
    """GPT of the comparison: 4 layers of 256.

    Target: as `bert`.
    Cost: 20 minutes on two CPU cores.

        prelm pretrain study:gpt1 --corpus simplewiki.txt.xz
    """
    return _gpt(hidden_size=256, num_layers=4, num_merges=8000, batch_size=32, steps=1500)


def elmo() -> Run:
    """ELMo of the comparison: LSTMs of 672 in both directions; a sampled softmax over up to 50,000 words.

    Target: as `bert`.
    Cost: 20 minutes on two CPU cores.

        prelm pretrain study:elmo --corpus simplewiki.txt.xz
    """
    return _elmo(projection_size=128, hidden_size=672, vocab_size=50_000, batch_size=128, steps=1500)


def bert_small() -> Run:
    """BERT of the short comparison, `make study`: 2 layers of 128.

    Target: as `bert`, on a smaller scale.
    Cost: 3 minutes on two CPU cores.

        prelm pretrain study:bert_small
    """
    return _bert(hidden_size=128, num_layers=2, vocab_size=4096, batch_size=32, steps=1500)


def gpt1_small() -> Run:
    """GPT of the short comparison: 2 layers of 128.

    Target: as `bert_small`.
    Cost: 3 minutes on two CPU cores.

        prelm pretrain study:gpt1_small
    """
    return _gpt(hidden_size=128, num_layers=2, num_merges=4000, batch_size=16, steps=1500)


def elmo_small() -> Run:
    """ELMo of the short comparison: LSTMs of 144 in both directions.

    Target: as `bert_small`.
    Cost: 3 minutes on two CPU cores.

        prelm pretrain study:elmo_small
    """
    return _elmo(projection_size=64, hidden_size=144, vocab_size=20_000, batch_size=64, steps=1500)


# Rates and batches as in the minis, where they were chosen by held-out loss; short packed rows take a BERT off the
# plateau near the unigram soonest.


def _bert(hidden_size: int, num_layers: int, vocab_size: int, batch_size: int, steps: int) -> Run:
    return Run(
        corpus=("python-docs",),
        held_out=0.02,
        tokenizer=WordPieceConfig(vocab_size=vocab_size),
        model=BertConfig(
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=hidden_size // 64,
            intermediate_size=4 * hidden_size,
            max_position_embeddings=64,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            initializer_range=_initializer_range(hidden_size),
        ),
        data=PairsConfig(
            max_length=64,
            max_predictions=20,
            masking=MaskingConfig(probability=0.3),
            short_sequence_probability=0.9,
            next_sentence=False,
            packing=True,
        ),
        optimizer=_muon(3e-3, matrix_learning_rate=0.01, weight_decay=0.01),
        batch_size=batch_size,
        loop=_loop(steps),
    )


def _gpt(hidden_size: int, num_layers: int, num_merges: int, batch_size: int, steps: int) -> Run:
    return Run(
        corpus=("python-docs",),
        held_out=0.02,
        tokenizer=BPEConfig(num_merges=num_merges),
        model=GPTConfig(
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=hidden_size // 64,
            max_position_embeddings=128,
            embedding_dropout=0.0,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            initializer_range=_initializer_range(hidden_size),
        ),
        data=WindowsConfig(max_length=128),
        optimizer=_muon(1e-2, matrix_learning_rate=0.01, weight_decay=0.01),
        batch_size=batch_size,
        loop=_loop(steps),
    )


def _elmo(projection_size: int, hidden_size: int, vocab_size: int, batch_size: int, steps: int) -> Run:
    return Run(
        corpus=("python-docs",),
        held_out=0.02,
        tokenizer=WordVocabularyConfig(vocab_size=vocab_size, lowercase=True),
        model=ELMoConfig(
            filters=((1, 16), (2, 32), (3, 64), (4, 64)),
            num_highways=1,
            projection_size=projection_size,
            hidden_size=hidden_size,
            dropout=0.0,
        ),
        data=StreamsConfig(max_length=20, num_negatives=1024),
        optimizer=_muon(1.5e-2, matrix_learning_rate=0.02, weight_decay=0.0),
        batch_size=batch_size,
        loop=_loop(steps),
    )


def _initializer_range(hidden_size: int) -> float:
    """Initial weights as large, relative to the width, as in the papers."""
    return round(0.02 * math.sqrt(768 / hidden_size), 3)


def _muon(learning_rate: float, matrix_learning_rate: float, weight_decay: float) -> Muon:
    """A constant rate after the warm-up; `decay_steps` counts only for a branch, whose decay is a trapezoid."""
    return Muon(
        learning_rate,
        warmup_steps=50,
        decay_steps=1_000_000,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=weight_decay,
        clip_norm=1.0,
        decay="none",
        matrix_learning_rate=matrix_learning_rate,
    )


def _loop(steps: int) -> LoopConfig:
    return LoopConfig(
        steps=steps,
        evaluate_every=500,
        save_every=500,
        log_every=50,
        keep_at_words=tuple(millions * 1_000_000 for millions in (*range(1, 11), *range(20, 110, 10))),
    )
