"""Tasks on a pretrained encoder: fine-tuning.

Each public function returns a FineTuning: `prelm finetune finetuning:NAME --help` explains it and lists its options.
"""

from prelm_jax.finetuning.config import FineTuning
from prelm_jax.models.heads import Label
from prelm_jax.training.loop import LoopConfig
from prelm_jax.training.optimizer import AdamW


def classify() -> FineTuning:
    """A class for each text or pair of texts, by BERT's recipe (Devlin et al. 2018, A.3; run_classifier.py).

    Target: SST-2 accuracy of 91 or more with a BERT of 6 layers, 93.5 with BERT-base (dev).
    Cost: 3 epochs; 10 minutes for 8,000 sentences and a BERT of 6 layers of 384 on two CPU cores.

        prelm finetune finetuning:classify --init-from DIR --train train.tsv --dev dev.tsv --columns.text sentence
    """
    return FineTuning(
        name="classify",
        head=Label(),
        optimizer=_adamw(learning_rate=5e-5),
        batch_size=32,
        epochs=3,
        loop=_loop(),
        max_length=128,
    )


def _adamw(learning_rate: float, bias_correction: str = "none", weight_decay: float = 0.01) -> AdamW:
    return AdamW(
        learning_rate,
        warmup_steps=0,
        decay_steps=1,
        b1=0.9,
        b2=0.999,
        eps=1e-6,
        weight_decay=weight_decay,
        clip_norm=1.0,
        bias_correction=bias_correction,
    )


def _loop() -> LoopConfig:
    return LoopConfig(steps=2**31 - 1, evaluate_every=1000, save_every=500, log_every=50, keep=1)
