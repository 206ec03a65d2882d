"""Tasks on a pretrained encoder.

Each public function returns a FineTuning: `prelm finetune finetuning:NAME --help` explains it and lists its options.
Files, columns and labels: docs/finetuning.md.
"""

import dataclasses

from prelm_jax.finetuning.config import FineTuning
from prelm_jax.models.heads import Choice, Config, Label, Span, Tags
from prelm_jax.training.loop import LoopConfig
from prelm_jax.training.optimizer import AdamW


def classify() -> FineTuning:
    """A class for each text or pair of texts, by the recipe of BERT-base (Devlin et al. 2018, A.3; run_classifier.py).

    Target: accuracy of 92.7 on SST-2 with the published BERT-base (Devlin et al. 2018, 5.1, dev).
    Cost: 3 epochs a seed; 4 minutes for 8,000 sentences and a BERT of 6 layers of 384 on two CPU cores.

        prelm finetune finetuning:classify --init-from DIR --train train.tsv --dev dev.tsv
    """
    return _bert("classify", Label())


def classify_small() -> FineTuning:
    """A class for each text or pair of texts, for BERTs of 2 to 8 layers: higher rates (google-research/bert, README).

    Target: accuracy of 85.9 on SST-2 with the published BERT-mini, 4 layers of 256 (test).
    Cost: 4 epochs.

        prelm finetune finetuning:classify_small --init-from DIR --train train.tsv --dev dev.tsv
    """
    return dataclasses.replace(_bert("classify_small", Label()), optimizer=_adamw(3e-4), epochs=4)


def classify_stable() -> FineTuning:
    """A class for each text or pair of texts, for few examples and large models (Mosbach et al. 2021).

    Target: accuracy of 70.1 ± 2.4 on RTE with BERT-large over 25 seeds, where BERT's recipe gives 52.3 ± 7.2 (dev).
    Cost: 20 epochs.

        prelm finetune finetuning:classify_stable --init-from DIR --train train.tsv --dev dev.tsv --seeds 5
    """
    optimizer = _adamw(2e-5, bias_correction="moments")
    return dataclasses.replace(_bert("classify_stable", Label()), optimizer=optimizer, batch_size=16, epochs=20)


def classify_gpt1() -> FineTuning:
    """A class for each text or pair of texts, by GPT-1's recipe with its language-model loss (Radford 2018, 4.1).

    Target: accuracy of 91.3 on SST-2 with the published GPT-1 (test).
    Cost: 3 epochs.

    For pairs without an order, which the paper reads in both orders, use --symmetric.

        prelm finetune finetuning:classify_gpt1 --init-from DIR --train train.tsv --dev dev.tsv
    """
    return _gpt1("classify_gpt1", Label(bias=False))


def classify_frozen() -> FineTuning:
    """A class for each text or pair of texts, by an LSTM on the mixed layers of a frozen encoder.

    Target: shows what an encoder knows; the published use of ELMo (Peters et al. 2018, 3.3).
    Cost: 10 epochs without backward pass in the encoder.

        prelm finetune finetuning:classify_frozen --init-from DIR --train train.tsv --dev dev.tsv
    """
    return _frozen("classify_frozen", Label(mix=True, lstm_size=200, dropout=0.5))


def classify_many() -> FineTuning:
    """Any number of labels for each text or pair of texts, by BERT's recipe.

    Target: micro-F1 above that of always giving the most frequent labels.
    Cost: 3 epochs, as `classify`.

        prelm finetune finetuning:classify_many --init-from DIR --train train.jsonl --dev dev.jsonl
    """
    return _bert("classify_many", Label(kind="labels"))


def rate() -> FineTuning:
    """A number for each text or pair of texts, by BERT's recipe; similarity, for example.

    Target: Spearman correlation of 88.5 on STS-B with the published BERT-base (transformers' examples, dev).
    Cost: 3 epochs, as `classify`.

        prelm finetune finetuning:rate --init-from DIR --train train.tsv --dev dev.tsv --columns.pair sentence2
    """
    return _bert("rate", Label(kind="number"))


def choose() -> FineTuning:
    """The option that goes best with a text, by BERT's recipe (Devlin et al. 2018, 4.4).

    Target: accuracy of 81.6 on SWAG with the published BERT-base (dev).
    Cost: 3 epochs; each option is read as a separate text.

        prelm finetune finetuning:choose --init-from DIR --train train.csv --dev dev.csv
    """
    return dataclasses.replace(_bert("choose", Choice()), batch_size=16, optimizer=_adamw(2e-5))


def choose_gpt1() -> FineTuning:
    """The option that goes best with a text, by GPT-1's recipe (Radford et al. 2018, 3.3 and 4.1).

    Target: accuracy of 86.5 on the Story Cloze test with the published GPT-1.
    Cost: 3 epochs.

        prelm finetune finetuning:choose_gpt1 --init-from DIR --train train.csv --dev dev.csv
    """
    return _gpt1("choose_gpt1", Choice())


def tag() -> FineTuning:
    """A tag for each word, by BERT's recipe (Devlin et al. 2018, 5.3): named entities, parts of speech.

    Target: span F1 of 96.4 on CoNLL-2003 with the published cased BERT-base (dev).
    Cost: 3 epochs.

        prelm finetune finetuning:tag --init-from DIR --train train.conll --dev dev.conll
    """
    return dataclasses.replace(_bert("tag", Tags()), max_length=None)


def tag_frozen() -> FineTuning:
    """A tag for each word, by LSTMs and a CRF on the mixed layers of a frozen encoder.

    Target: span F1 of 92.2 on CoNLL-2003 with the published ELMo and GloVe vectors (Peters et al. 2018, 4; test).
    Cost: 10 epochs without backward pass in the encoder.

        prelm finetune finetuning:tag_frozen --init-from DIR --train train.conll --dev dev.conll
    """
    return _frozen("tag_frozen", Tags(crf=True, mix=True, lstm_size=200, lstm_layers=2, dropout=0.5))


def answer() -> FineTuning:
    """The span of a passage that answers a question, or none, by BERT's recipe (Devlin et al. 2018, 4.2; run_squad.py).

    Target: F1 of 88.5 on SQuAD 1.1 with the published BERT-base (dev).
    Cost: 2 epochs of rows of 384 tokens.

        prelm finetune finetuning:answer --init-from DIR --train train-v2.0.json --dev dev-v2.0.json
    """
    return dataclasses.replace(_bert("answer", Span()), epochs=2, max_length=384)


def _bert(name: str, head: Config) -> FineTuning:
    return FineTuning(
        name=name, head=head, optimizer=_adamw(5e-5), batch_size=32, epochs=3, loop=_loop(), max_length=128
    )


def _gpt1(name: str, head: Config) -> FineTuning:
    """openai/finetune-transformer-lm, train.py: warm-up of 0.2 % and Adam with its bias correction in the rate."""
    optimizer = _adamw(6.25e-5, bias_correction="rate", eps=1e-8)
    return FineTuning(
        name=name,
        head=head,
        optimizer=optimizer,
        batch_size=32,
        epochs=3,
        loop=_loop(),
        warmup=0.002,
        lm_coefficient=0.5,
    )


def _frozen(name: str, head: Config) -> FineTuning:
    """AllenNLP's configurations of ELMo: Adam with 1e-3 and clipping; a fixed number of epochs instead of patience."""
    optimizer = _adamw(1e-3, bias_correction="moments", weight_decay=0.0, eps=1e-8, clip_norm=5.0)
    return FineTuning(
        name=name, head=head, optimizer=optimizer, batch_size=64, epochs=10, loop=_loop(), warmup=0.0, tune="head"
    )


def _adamw(
    learning_rate: float,
    bias_correction: str = "none",
    weight_decay: float = 0.01,
    eps: float = 1e-6,
    clip_norm: float = 1.0,
) -> AdamW:
    """The steps of the schedule follow from --epochs and --warmup."""
    return AdamW(
        learning_rate,
        warmup_steps=0,
        decay_steps=1,
        b1=0.9,
        b2=0.999,
        eps=eps,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        bias_correction=bias_correction,
    )


def _loop() -> LoopConfig:
    """As many steps as the epochs have."""
    return LoopConfig(steps=2**31 - 1, evaluate_every=1000, save_every=500, log_every=50, keep=1)
