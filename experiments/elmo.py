"""ELMo (Peters et al. 2018, "Deep Contextualized Word Representations").

Each public function returns a Run: `prelm pretrain elmo:NAME --help` explains it and lists its options.
"""

from prelm_jax.data.streams import StreamsConfig
from prelm_jax.models.elmo import ELMoConfig
from prelm_jax.run import Run
from prelm_jax.tokenizers.words import WordVocabularyConfig
from prelm_jax.training.loop import LoopConfig
from prelm_jax.training.muon import Muon
from prelm_jax.training.optimizer import Adagrad


def demo() -> Run:
    """An ELMo for a coffee break: LSTMs of 256, on the documentation inside every Python (2 MB).

    Target: held-out perplexity of 70, in both directions; a trigram model has 114.
    Cost: 2 minutes on two CPU cores.

    The softmax samples 1,024 of its 8,000 words, which makes steps cheaper. Tuned on 2 MB of Simple English Wikipedia,
    where a trigram model has a perplexity of 141. There this reaches 80 in 110 seconds; 1,500 steps of half the rows
    and twice the filters reach 82 in 120 seconds, 1,000 of these steps with the full softmax 92, and 1,500 steps of
    AdamW, with dropout, 111.

        prelm pretrain elmo:demo
    """
    return Run(
        corpus=("python-docs",),
        held_out=0.05,
        tokenizer=WordVocabularyConfig(vocab_size=8000),
        model=_short_run(projection_size=64, hidden_size=256),
        data=StreamsConfig(max_length=20, num_negatives=1024),
        optimizer=_muon(warmup_steps=50, decay_steps=1000),
        batch_size=64,
        loop=LoopConfig(steps=1000, evaluate_every=200, save_every=500, log_every=50),
    )


def mini() -> Run:
    """A first ELMo of a language or a domain: LSTMs of 512, projected to 128.

    Target: held-out perplexity 30 % below a trigram model's on Simple English Wikipedia (106 MB).
    Cost: 20 minutes on two CPU cores.

    Tuned on 57 MB of English Wikipedia, where a trigram model has a perplexity of 198: after the tokens that 20 minutes
    allow, this has 120; half the rows with LSTMs of 1024 have 142.

    With more time, raise steps and schedule together: --steps 20000 --optimizer.decay-steps 20000.

        prelm pretrain elmo:mini --corpus simplewiki.txt.xz
    """
    return Run(
        corpus=("corpus/*.txt",),
        held_out=0.01,
        tokenizer=WordVocabularyConfig(vocab_size=30_000),
        model=_short_run(projection_size=128, hidden_size=512),
        data=StreamsConfig(max_length=20, num_negatives=2048),
        optimizer=_muon(warmup_steps=80, decay_steps=2000),
        batch_size=128,
        loop=LoopConfig(steps=2000, evaluate_every=500, save_every=250),
    )


def small() -> Run:
    """ELMo small: LSTMs of 1024, projected to 128; 13.6 million parameters and a softmax.

    Target: the published F1 of 83.6 on semantic role labeling, one point below `original`.
    Cost: about a seventh of the parameters of `original`. On a CPU, use fewer filters and words.

        prelm pretrain elmo:small --corpus 'corpus/*.txt.gz'
    """
    return _published(projection_size=128, hidden_size=1024, num_highways=1)


def medium() -> Run:
    """ELMo medium: LSTMs of 2048, projected to 256; 28.0 million parameters and a softmax.

    Target: the published F1 of 84.0 on semantic role labeling.
    Cost: about a third of the parameters of `original`.

        prelm pretrain elmo:medium --corpus 'corpus/*.txt.gz'
    """
    return _published(projection_size=256, hidden_size=2048, num_highways=1)


def original() -> Run:
    """ELMo original: LSTMs of 4096, projected to 512; 93.6 million parameters and a softmax of 407 million.

    Target: the paper's held-out perplexity of 39.7, the mean of both directions.
    Cost: two weeks on three GPUs in the paper: 10 epochs of the 1 Billion Word Benchmark, 3 × 128 rows a step.

    The benchmark has one sentence per line, already split into words:

        prelm pretrain elmo:original --tokenizer.no-tokenize \\
            --corpus 'training-monolingual.tokenized.shuffled/*,documents=line,sentences=line'
    """
    return _published(projection_size=512, hidden_size=4096, num_highways=2)


def _published(projection_size: int, hidden_size: int, num_highways: int) -> Run:
    return Run(
        corpus=("corpus/*.txt",),
        held_out=0.001,
        tokenizer=WordVocabularyConfig(vocab_size=793_471, min_count=3),
        model=ELMoConfig(projection_size=projection_size, hidden_size=hidden_size, num_highways=num_highways),
        data=StreamsConfig(max_length=20, num_negatives=8192),
        optimizer=_adagrad(),
        batch_size=384,
        loop=LoopConfig(steps=1_000_840, save_every=5000, evaluate_every=5000, log_every=100),
        precision="bfloat16",
    )


def _short_run(projection_size: int, hidden_size: int) -> ELMoConfig:
    """A small ELMo for a short run: few filters, no dropout."""
    return ELMoConfig(
        filters=((1, 16), (2, 32), (3, 64), (4, 64)),
        num_highways=1,
        projection_size=projection_size,
        hidden_size=hidden_size,
        dropout=0.0,
    )


def _adagrad() -> Adagrad:
    return Adagrad(learning_rate=0.2, unroll_steps=20, initial_accumulator=1.0, clip_norm=10.0)


def _muon(warmup_steps: int, decay_steps: int) -> Muon:
    return Muon(
        1.5e-2,
        warmup_steps,
        decay_steps,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        clip_norm=1.0,
        matrix_learning_rate=0.02,
    )
