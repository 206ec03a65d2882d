"""GPT-1 (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training").

Each public function returns a Run: `prelm pretrain gpt1:NAME --help` explains it and lists its options.
"""

import math

from prelm_jax.data.windows import WindowsConfig
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.run import Run
from prelm_jax.tokenizers.bpe import BPEConfig
from prelm_jax.training.loop import LoopConfig
from prelm_jax.training.muon import Muon
from prelm_jax.training.optimizer import AdamW


def demo() -> Run:
    """A GPT for a coffee break: 2 layers of 128, on the documentation inside every Python (2 MB).

    Target: 1.66 bits per byte of held-out text; a trigram model has 1.76.
    Cost: 2 minutes on two CPU cores.

    Learning rates and merges were tuned on 2 MB of Simple English Wikipedia. With a larger vocabulary the same number
    of tokens covers more text: 5,000 merges reach 1.676 bits per byte there, and 1,500 merges 1.786 in the same time.

        prelm pretrain gpt1:demo
    """
    return Run(
        corpus=("python-docs",),
        held_out=0.05,
        tokenizer=BPEConfig(num_merges=5000),
        model=_short_run(hidden_size=128, num_layers=2),
        data=WindowsConfig(max_length=128),
        optimizer=_muon(6e-3, warmup_steps=50, decay_steps=800, matrix_learning_rate=0.02),
        batch_size=16,
        loop=LoopConfig(steps=800, evaluate_every=200, save_every=400, log_every=50),
    )


def mini() -> Run:
    """A first model of a genre: 4 layers of 192, on some dozens of novels (57 MB).

    Target: 1.52 bits per byte of held-out novels; a trigram model of all training novels has 1.63.
    Cost: 20 minutes on two CPU cores.

    Tuned on 57 MB of English Wikipedia, where a trigram model has 1.73 bits per byte: after the tokens that 20 minutes
    allow, this has 1.60; twice the matrix_learning_rate 1.61; half the rows 1.69, with 5,000 merges 1.74, with 2,000
    merges 1.80.

    With more time, raise steps and schedule together: --steps 20000 --optimizer.decay-steps 20000.

        prelm pretrain gpt1:mini --corpus 'novels/*.txt.xz,documents=file'
    """
    return Run(
        corpus=("novels/*.txt,documents=file",),
        held_out=0.05,
        tokenizer=BPEConfig(num_merges=10_000),
        model=_short_run(hidden_size=192, num_layers=4),
        data=WindowsConfig(max_length=128),
        optimizer=_muon(1e-2, warmup_steps=60, decay_steps=1500, matrix_learning_rate=0.01),
        batch_size=32,
        loop=LoopConfig(steps=1500, evaluate_every=500, evaluate_batches=128, save_every=250),
    )


def base() -> Run:
    """GPT-1: 12 layers of 768, 117 million parameters.

    Target: the paper's perplexity of 18.4 per token of its own vocabulary.
    Cost: a month on 8 GPUs in the paper: 100 epochs of BooksCorpus (about a billion words), 64 sequences of 512 tokens
    a step.

    The learning rate warms up over 2,000 steps, then falls along a cosine. What the paper leaves open (betas, epsilon,
    clipping) follows the authors' fine-tuning code. Their variant of Adam is `--optimizer.bias-correction rate`; it
    differs from AdamW in the first thousand steps only.

        prelm pretrain gpt1:base --corpus 'books/*.txt.gz,documents=file,cleaning=gpt'
    """
    return Run(
        corpus=("books/*.txt,documents=file,cleaning=gpt",),
        held_out=0.001,
        tokenizer=BPEConfig(num_merges=40_000),
        model=GPTConfig(),
        data=WindowsConfig(max_length=512),
        optimizer=_adamw(learning_rate=2.5e-4, warmup_steps=2000, decay_steps=3_360_000),
        batch_size=64,
        loop=LoopConfig(steps=3_360_000, save_every=5000, evaluate_every=5000, log_every=100),
        precision="bfloat16",
    )


def _short_run(hidden_size: int, num_layers: int) -> GPTConfig:
    """A small GPT for a short run: no dropout; initial weights as large, relative to the width, as the paper's."""
    return GPTConfig(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=hidden_size // 64,
        embedding_dropout=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        initializer_range=round(0.02 * math.sqrt(768 / hidden_size), 3),
    )


def _adamw(learning_rate: float, warmup_steps: int, decay_steps: int) -> AdamW:
    return AdamW(
        learning_rate,
        warmup_steps,
        decay_steps,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.01,
        clip_norm=1.0,
        decay="cosine",
    )


def _muon(learning_rate: float, warmup_steps: int, decay_steps: int, matrix_learning_rate: float) -> Muon:
    return Muon(
        learning_rate,
        warmup_steps,
        decay_steps,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.01,
        clip_norm=1.0,
        matrix_learning_rate=matrix_learning_rate,
    )
