"""Peers of `time_to_loss.py`: pretraining as people write it in PyTorch, from a text file to a trained model.

    python benchmarks/peers.py --peer torch-bert --text train.txt --tokenizer DIR --model model.json --snapshots DIR …

hf-trainer   transformers' BertForMaskedLM, Trainer and data collator, in the manner of its run_mlm example; needs
             pip install accelerate
torch-bert   torch_bert.py: masked-LM alone, masked positions only, fused attention and AdamW
torch-gpt    torch_gpt.py, in the manner of nanoGPT: random windows of one array of ids, AdamW, cosine
torch-elmo   torch_elmo.py, in the manner of bilm-tf: rows that run through the text, Adagrad at a constant rate

Each trains a vocabulary of the size of ours itself, because that takes time, and then loads ours, so that all losses
are on the same ids; on a GPU, where nobody looks at the clock, it only loads ours. ELMo's peer reads text that is split
into words already. Snapshots are state dicts.
"""

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import tokenizers
import torch
import tyro
from torch import Tensor, nn

Peer = Literal["hf-trainer", "torch-bert", "torch-gpt", "torch-elmo"]
Arrays = dict[str, np.ndarray]
IGNORED = -100  # PyTorch's label of positions that are not predicted


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What a trial may change."""

    learning_rate: float = 1e-3
    warmup: float = 0.06  # Fraction of the steps in which the rate rises.
    batch_size: int = 32
    length: int = 64
    masking: float = 0.15
    muon_rate: float = 0.0  # Rate of torch.optim.Muon for the matrices of the blocks; 0: AdamW takes all.


@dataclasses.dataclass(frozen=True)
class Settings:
    """A training."""

    peer: Peer
    text: Path
    tokenizer: Path  # Directory of our vocabulary.
    model: Path  # JSON of our model's config.
    snapshots: Path
    snapshot_at: tuple[int, ...]  # The last one ends the training.
    tuning: Tuning
    seed: int = 0
    threads: int = 2
    device: str = "cpu"


# Models


def build(peer: Peer, sizes: dict[str, Any], rows: int) -> tuple[nn.Module, Callable[[dict[str, Tensor]], Tensor]]:
    """A model of our sizes without dropout, and its mean loss of a batch that `to_torch` made.

    They are on PyTorch's current device.
    """
    c = SimpleNamespace(**sizes | {"dropout": 0.0})
    if peer == "torch-elmo":
        from torch_elmo import TorchELMo

        model = TorchELMo(c, rows)
        return model, model
    shape = (c.vocab_size, c.hidden_size, c.num_layers, c.max_position_embeddings)
    if peer == "torch-gpt":
        from torch_gpt import TorchGPT

        model = TorchGPT(*shape, dropout=0.0)
        return model, lambda batch: model(batch["tokens"], batch["targets"])
    if peer == "torch-bert":
        from torch_bert import TorchBert

        model = TorchBert(*shape, dropout=0.0)
        return model, model
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(
        BertConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            intermediate_size=c.intermediate_size,
            max_position_embeddings=c.max_position_embeddings,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )

    def loss(batch: dict[str, Tensor]) -> Tensor:
        labels = torch.full_like(batch["tokens"], IGNORED)
        row, slot = (batch["masked_targets"] != IGNORED).nonzero(as_tuple=True)
        labels[row, batch["masked_positions"][row, slot]] = batch["masked_targets"][row, slot]
        return model(input_ids=batch["tokens"], attention_mask=batch["segments"], labels=labels).loss

    return model, loss


def to_torch(batch: Arrays, device: torch.device) -> dict[str, Tensor]:
    """A batch with the keys of ours; targets of weight 0 become IGNORED, as the losses of PyTorch have it."""
    arrays = dict(batch)
    for weights, targets in (("masked_weights", "masked_targets"), ("weights", "targets")):
        if weights in arrays:
            arrays[targets] = np.where(arrays[weights] > 0, arrays[targets], IGNORED)
    tensors = {k: torch.from_numpy(x.astype(np.int64) if x.dtype.kind == "i" else x) for k, x in arrays.items()}
    return {k: x.to(device) for k, x in tensors.items()}


# Text


def wordpiece(s: Settings, vocab_size: int) -> tuple[np.ndarray, tokenizers.Tokenizer]:
    """The ids of the text, end to end, by our WordPiece, after one of their own was trained."""
    if s.device == "cpu":
        own = tokenizers.BertWordPieceTokenizer(lowercase=True)
        own.train([str(s.text)], vocab_size=vocab_size, show_progress=False)
    return encoded(s)


def bpe(s: Settings, vocab_size: int) -> tuple[np.ndarray, tokenizers.Tokenizer]:
    """The same with byte-pairs."""
    if s.device == "cpu":
        own = tokenizers.CharBPETokenizer(lowercase=True, unk_token="<unk>")
        own.train([str(s.text)], vocab_size=vocab_size, special_tokens=["<unk>"], show_progress=False)
    return encoded(s)


def encoded(s: Settings) -> tuple[np.ndarray, tokenizers.Tokenizer]:
    """The ids of the text by our vocabulary."""
    known = tokenizers.Tokenizer.from_file(str(s.tokenizer / "tokenizer.json"))
    found = []
    with s.text.open(encoding="utf-8") as file:
        while lines := list(itertools.islice(file, 10_000)):
            for encoding in known.encode_batch_fast([line.strip() for line in lines], add_special_tokens=False):
                found.append(np.array(encoding.ids, np.uint16))
    return np.concatenate(found), known


def framed(ids: np.ndarray, known: tokenizers.Tokenizer, length: int) -> np.ndarray:
    """[N, length]: the text in rows, each between [CLS] and [SEP]."""
    rows = ids[: len(ids) // (length - 2) * (length - 2)].reshape(-1, length - 2)
    return np.pad(
        rows, ((0, 0), (1, 1)), constant_values=((0, 0), (known.token_to_id("[CLS]"), known.token_to_id("[SEP]")))
    )


# Batches, without end


def shuffled(rows: np.ndarray, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of rows in random order, epoch after epoch."""
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield rows[order[start : start + batch_size]].astype(np.int64)


def masked(rows: np.ndarray, known: tokenizers.Tokenizer, t: Tuning, rng: np.random.Generator) -> Iterator[Arrays]:
    """BERT's batches: of the masked tokens 80 % become [MASK], 10 % a random token, 10 % stay."""
    count = max(1, round(t.masking * (t.length - 2)))
    for tokens_BT in shuffled(rows, t.batch_size, rng):
        chosen_BM = 1 + rng.random((t.batch_size, t.length - 2)).argpartition(count - 1, 1)[:, :count]
        targets_BM = np.take_along_axis(tokens_BT, chosen_BM, 1)
        chance_BM = rng.random(chosen_BM.shape)
        random_BM = rng.integers(0, known.get_vocab_size(), chosen_BM.shape)
        inputs_BM = np.where(chance_BM < 0.9, random_BM, targets_BM)
        np.put_along_axis(tokens_BT, chosen_BM, np.where(chance_BM < 0.8, known.token_to_id("[MASK]"), inputs_BM), 1)
        fixed = {"token_types": np.zeros_like(tokens_BT), "segments": np.ones_like(tokens_BT)}
        yield fixed | {"tokens": tokens_BT, "masked_positions": chosen_BM, "masked_targets": targets_BM}


def windows(ids: np.ndarray, t: Tuning, rng: np.random.Generator) -> Iterator[Arrays]:
    """GPT's batches: windows from anywhere in the text."""
    while True:
        start_B = rng.integers(0, len(ids) - t.length, t.batch_size)
        rows = ids[start_B[:, None] + np.arange(t.length + 1)].astype(np.int64)
        yield {"tokens": rows[:, :-1], "targets": rows[:, 1:]}


def streams(s: Settings, vocab_size: int, num_negatives: int, rng: np.random.Generator) -> Iterator[Arrays]:
    """ELMo's batches: each row reads its part of the sentences, which are in random order, in both directions."""
    sentences = [line.split() for line in s.text.read_text(encoding="utf-8").split("\n") if line]
    counts = Counter(itertools.chain.from_iterable(sentences))
    counts.most_common(vocab_size)  # Its own vocabulary; then ours.
    vocabulary = (s.tokenizer / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    known = {word: i for i, word in enumerate(vocabulary)}
    begin, end, unknown = (known[token] for token in ("<S>", "</S>", "<UNK>"))
    types = list(known) + [word for word in counts if word not in known]
    index = {word: i for i, word in enumerate(types)}
    characters_VC = np.full((len(types), 50), 260, np.int16)
    for row, word in zip(characters_VC, types, strict=True):
        letters = {"<S>": [256], "</S>": [257]}.get(word, list(word.encode()[:48]))
        row[: len(letters) + 2] = [258, *letters, 259]
    numbered = [np.array([index[word] for word in sentence], np.int32) for sentence in sentences]
    T, B = s.tuning.length, s.tuning.batch_size
    while True:
        order = rng.permutation(len(numbered))
        forward = np.concatenate([np.append(begin, numbered[i]) for i in order] + [[begin]])
        backward = np.concatenate([np.append(end, numbered[i][::-1]) for i in order] + [[end]])
        # Where the next sentence begins, the target is the end of this one (backward: its beginning).
        lines = {"forward": (forward, begin, end), "backward": (backward, end, begin)}
        size = (len(forward) - 1) // B
        for t in range(0, size - T + 1, T):
            at_BT = np.arange(B)[:, None] * size + t + np.arange(T)
            batch, words = {}, []
            for d, (line, first, last) in lines.items():
                targets_BT = np.where(line[at_BT + 1] == first, last, line[at_BT + 1])
                batch[f"{d}_targets"] = np.where(targets_BT < len(known), targets_BT, unknown)
                batch[f"{d}_weights"] = np.ones((B, T), np.float32)
                words.append(line[at_BT])
                if num_negatives:
                    batch |= negatives(d, num_negatives, len(known), rng)
            distinct, inverse = np.unique(np.stack(words), return_inverse=True)
            batch |= dict(zip(("forward_words", "backward_words"), inverse.reshape(2, B, T), strict=True))
            yield batch | {"characters": characters_VC[distinct]}


def negatives(direction: str, count: int, vocab_size: int, rng: np.random.Generator) -> Arrays:
    """Distinct words from the log-uniform distribution, and the number of draws that gave them."""
    draws = np.exp(rng.random(100 * count) * math.log(vocab_size + 1)).astype(np.int64) - 1
    first = np.sort(np.unique(draws, return_index=True)[1])[:count]
    return {f"{direction}_negatives": draws[first], f"{direction}_tries": np.array(first[-1] + 1, np.float32)}


# Training


def optimizers(peer: Peer, model: nn.Module, t: Tuning) -> list[torch.optim.Optimizer]:
    """Adagrad for ELMo; else AdamW without decay on vectors, and Muon for the matrices of blocks if it has a rate."""
    if peer == "torch-elmo":
        return [
            torch.optim.Adagrad(
                model.parameters(), t.learning_rate, initial_accumulator_value=1.0, eps=0.0, foreach=True
            )
        ]
    taken = [p for p in model.blocks.parameters() if p.ndim == 2] if t.muon_rate else []
    rest = [p for p in model.parameters() if not any(p is other for other in taken)]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (0.9, 0.95) if peer == "torch-gpt" else (0.9, 0.999)
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, t.learning_rate, betas, fused=True)]
    return found + ([torch.optim.Muon(taken, t.muon_rate, weight_decay=0.01)] if taken else [])


def train(s: Settings, model: nn.Module, loss_of_batch: Callable, batches: Iterator[Arrays]) -> None:
    """The loop: warm-up, then linear decay (BERT), a cosine (GPT), or a constant rate (ELMo)."""
    steps, found = s.snapshot_at[-1], optimizers(s.peer, model, s.tuning)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in found]
    for step, batch in zip(range(steps), batches, strict=False):
        left = 1 - step / steps
        decay = {"torch-bert": left, "torch-gpt": 0.5 * (1 - math.cos(math.pi * left)), "torch-elmo": 1.0}[s.peer]
        if s.peer != "torch-elmo":
            decay = min(decay, (step + 1) / max(1, s.tuning.warmup * steps))
        for optimizer, rates in zip(found, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = decay * peak
            optimizer.zero_grad(set_to_none=True)
        loss = loss_of_batch(to_torch(batch, torch.device(s.device)))
        (loss * s.tuning.length if s.peer == "torch-elmo" else loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0 if s.peer == "torch-elmo" else 1.0)
        for optimizer in found:
            optimizer.step()
        if step + 1 in s.snapshot_at:
            snapshot(model, s.snapshots, step + 1)


def snapshot(model: nn.Module, directory: Path, step: int) -> None:
    """Saves the parameters as DIRECTORY/STEP, at once."""
    torch.save(model.state_dict(), directory / f"{step}.partial")
    (directory / f"{step}.partial").rename(directory / str(step))


def train_with_trainer(s: Settings, model: nn.Module, rows: np.ndarray, known: tokenizers.Tokenizer) -> None:
    """transformers' Trainer, its AdamW with a linear decay, its masks drawn by its collator."""
    import transformers

    special = {
        "pad_token": "[PAD]",
        "mask_token": "[MASK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "unk_token": "[UNK]",
    }
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=known, **special)

    class Snapshots(transformers.TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in s.snapshot_at:
                snapshot(model, s.snapshots, state.global_step)

    t, steps = s.tuning, s.snapshot_at[-1]
    arguments = transformers.TrainingArguments(
        output_dir=str(s.snapshots / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=t.batch_size,
        learning_rate=t.learning_rate,
        warmup_steps=round(t.warmup * steps),
        weight_decay=0.01,
        lr_scheduler_type="linear",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=s.device == "cpu",
        seed=s.seed,
    )
    transformers.Trainer(
        model=model,
        args=arguments,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=t.masking),
        train_dataset=[{"input_ids": row} for row in rows.astype(np.int64)],
        callbacks=[Snapshots()],
    ).train()


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    torch.manual_seed(s.seed)
    rng, sizes = np.random.default_rng(s.seed), json.loads(s.model.read_text())
    with torch.device(s.device):
        model, loss_of_batch = build(s.peer, sizes, s.tuning.batch_size)
    if s.peer == "torch-elmo":
        return train(s, model, loss_of_batch, streams(s, sizes["vocab_size"], sizes["num_negatives"], rng))
    if s.peer == "torch-gpt":
        ids, _ = bpe(s, sizes["vocab_size"])
        return train(s, model, loss_of_batch, windows(ids, s.tuning, rng))
    ids, known = wordpiece(s, sizes["vocab_size"])
    rows = framed(ids, known, s.tuning.length)
    if s.peer == "hf-trainer":
        return train_with_trainer(s, model, rows, known)
    return train(s, model, loss_of_batch, masked(rows, known, s.tuning, rng))


if __name__ == "__main__":
    main(tyro.cli(Settings))
