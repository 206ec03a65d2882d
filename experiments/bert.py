"""BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805).

Each public function returns a Run: `prelm pretrain bert:NAME --help` explains it and lists its options. To use a
component of another class, add a function to a copy of this file:

    def sentencepiece() -> Run:
        return dataclasses.replace(mini(), tokenizer=SentencePieceConfig(vocab_size=8192))
"""

import dataclasses
import math

from prelm_jax.data.masking import MaskingConfig
from prelm_jax.data.pairs import PairsConfig
from prelm_jax.models.bert import BertConfig
from prelm_jax.run import Run
from prelm_jax.tokenizers.wordpiece import WordPieceConfig
from prelm_jax.training.loop import LoopConfig
from prelm_jax.training.muon import Muon
from prelm_jax.training.optimizer import AdamW


def demo() -> Run:
    """A BERT for a coffee break: 2 layers of 128, on the documentation inside every Python (2 MB).

    Target: held-out masked-LM loss 2.0 nats below the unigram baseline.
    Cost: 2 minutes on two CPU cores.

    Such a short run may end on the plateau near the unigram loss. Muon and masking 30 % of the tokens together shorten
    it: tuned on 2 MB of Simple English Wikipedia, where the loss after 1,500 steps is 2.46 nats below the unigram, but
    1.07 with 15 %.

        prelm pretrain bert:demo
    """
    return Run(
        corpus=("python-docs",),
        held_out=0.05,
        tokenizer=WordPieceConfig(vocab_size=2048),
        model=_short_run(hidden_size=128, num_layers=2),
        data=_pairs(max_length=64, max_predictions=20, probability=0.3),
        optimizer=_muon(warmup_steps=50, decay_steps=1500, matrix_learning_rate=0.02),
        batch_size=32,
        loop=LoopConfig(steps=1500, evaluate_every=300, save_every=500, log_every=50),
    )


def mini() -> Run:
    """BERT-mini, 4 layers of 256: a first model of a language or a domain.

    Target: held-out masked-LM loss 2.5 nats below the unigram baseline on Simple English Wikipedia (106 MB).
    Cost: 20 minutes on two CPU cores.

    Many short rows per step shorten the plateau near the unigram loss. Tuned on 57 MB of English Wikipedia (unigram
    7.03): after the tokens that 20 minutes allow, the masked-LM loss is 4.61, evaluated with 30 % of the tokens masked;
    with other settings:

        matrix_learning_rate 0.02                                       4.80
        the same with 64 rows of 64 tokens; packed                      5.34; 5.02
        the same with 64 rows of 32 tokens                              5.07
        the same with 32 rows of 64 tokens: still on the plateau        6.46

    Masking 20 % of the tokens, packing, and no next-sentence prediction each changed the loss by less than 0.06. Only
    32 position embeddings are trained; for longer texts continue with --init-from and a larger --data.max-length.
    With more time, raise steps and schedule together: --steps 20000 --optimizer.decay-steps 20000.

        prelm pretrain bert:mini --corpus simplewiki.txt.xz
    """
    return Run(
        corpus=("corpus/*.txt",),
        held_out=0.01,
        tokenizer=WordPieceConfig(vocab_size=8192),
        model=_short_run(hidden_size=256, num_layers=4),
        data=_pairs(max_length=32, max_predictions=10, probability=0.3),
        optimizer=_muon(warmup_steps=60, decay_steps=1475, matrix_learning_rate=0.01),
        batch_size=128,
        loop=LoopConfig(steps=1475, evaluate_every=295, save_every=200),
    )


def base() -> Run:
    """BERT-base, phase 1: 110 million parameters; 90 % of the paper's steps, on sequences of 128 tokens.

    Target: the paper's GLUE average of 79.6 and masked-LM perplexity of about 4.0, after `base_512`.
    Cost: 4 days on 16 TPU chips in the paper: 1M steps of 256 sequences, from Wikipedia and BooksCorpus (3.3 billion
    words).

        prelm pretrain bert:base --corpus 'wikipedia/*.txt.gz' 'books/*.txt.gz,documents=file'
    """
    return Run(
        corpus=("corpus/*.txt",),
        held_out=0.001,
        tokenizer=WordPieceConfig(vocab_size=30522),
        model=BertConfig(),
        data=_pairs(max_length=128, max_predictions=20),
        optimizer=_adamw(learning_rate=1e-4, warmup_steps=10_000, decay_steps=1_000_000, bias_correction="none"),
        batch_size=256,
        loop=LoopConfig(steps=900_000, save_every=5000, evaluate_every=5000, log_every=100),
        precision="bfloat16",
    )


def base_512() -> Run:
    """BERT-base, phase 2: sequences of 512 tokens, for the position embeddings that phase 1 never trained.

    Target: as `base`.
    Cost: part of the 4 days of `base`: the last 10 % of the steps.

    The learning rate continues from the end of phase 1 and falls from 1e-5 to zero over 100,000 steps. Divergence: the
    original kept the moments of phase 1; here they start at zero, which matters little at so low a rate.

        prelm pretrain bert:base_512 --corpus 'wikipedia/*.txt.gz' --init-from runs/bert-base
    """
    return dataclasses.replace(
        base(),
        data=_pairs(max_length=512, max_predictions=76),
        optimizer=_adamw(learning_rate=1e-5, warmup_steps=0, decay_steps=100_000, bias_correction="none"),
        loop=dataclasses.replace(base().loop, steps=100_000),
    )


def large() -> Run:
    """BERT-large, phase 1: 24 layers of 1024, 340 million parameters.

    Target: the paper's GLUE average of 82.1 and masked-LM perplexity of about 3.2, after a phase 2.
    Cost: 4 days on 64 TPU chips in the paper.

        prelm pretrain bert:large --corpus 'wikipedia/*.txt.gz' 'books/*.txt.gz,documents=file'
    """
    return dataclasses.replace(
        base(), model=BertConfig(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096)
    )


def chinese_base() -> Run:
    """BERT-base for Chinese, phase 1: each ideograph is a token, so the published vocabulary has 21,128 tokens.

    Target: the published accuracy of 77.2 on the Chinese part of XNLI.
    Cost: as `base`.

    The original masks single characters. To mask the characters of a word together, as BERT-wwm does (extra `chinese`):
    --data.masking.whole-word --data.masking.segmenter jieba.

        prelm pretrain bert:chinese_base --corpus 'zhwiki/*.txt.xz'
    """
    return dataclasses.replace(base(), tokenizer=WordPieceConfig(vocab_size=21128))


def _short_run(hidden_size: int, num_layers: int) -> BertConfig:
    """A small BERT for a short run: no dropout; initial weights as large, relative to the width, as the paper's."""
    return BertConfig(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=hidden_size // 64,
        intermediate_size=4 * hidden_size,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        initializer_range=round(0.02 * math.sqrt(768 / hidden_size), 3),
    )


def _pairs(max_length: int, max_predictions: int, probability: float = 0.15) -> PairsConfig:
    return PairsConfig(
        max_length=max_length,
        max_predictions=max_predictions,
        masking=MaskingConfig(probability=probability),
        short_sequence_probability=0.1,
    )


def _adamw(learning_rate: float, warmup_steps: int, decay_steps: int, bias_correction: str) -> AdamW:
    return AdamW(
        learning_rate,
        warmup_steps,
        decay_steps,
        b1=0.9,
        b2=0.999,
        eps=1e-6,
        weight_decay=0.01,
        clip_norm=1.0,
        bias_correction=bias_correction,
    )


def _muon(warmup_steps: int, decay_steps: int, matrix_learning_rate: float) -> Muon:
    return Muon(
        3e-3,
        warmup_steps,
        decay_steps,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.01,
        clip_norm=1.0,
        matrix_learning_rate=matrix_learning_rate,
    )
