"""Training against PyTorch: the loss of every step, from the same initial weights on the same batches.

    python benchmarks/fidelity.py [--json FILE] [--picture docs/fidelity.svg]
    python benchmarks/fidelity.py --families finetuning --init-from DIR --train sst2/train.tsv --steps 200

ours      `prelm pretrain`, or `prelm finetune`: loop, gradients, clipping, optimizer, schedule
PyTorch   the modules of transformers' BertForPreTraining and OpenAIGPTLMHeadModel, opened from our export of the
          initial weights; for ELMo torch_elmo.py. PyTorch's gradients, clipping and optimizers; rules that it lacks are
          written here after the papers.

In fp32, without dropout, on the documentation inside Python. Prints the largest difference of each family; exits with 1
if it is above 1e-3. The families train with three rules: BERT with Adam without bias correction and a linear decay,
GPT with AdamW and a cosine, ELMo with Adagrad. `finetuning` trains a classifier on a pretrained BERT by the recipe of
finetuning:classify; PyTorch's is transformers' BertForSequenceClassification. Needs the extra `test`.
"""

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import harness
import jax
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import tyro
from torch_elmo import TorchELMo

from prelm_jax import pretraining
from prelm_jax.cli.experiments import load_run_or_task
from prelm_jax.data.examples import Columns
from prelm_jax.data.pairs import PairsConfig
from prelm_jax.data.streams import StreamsConfig
from prelm_jax.data.tasks import TaskBatches
from prelm_jax.data.windows import WindowsConfig
from prelm_jax.families import find_family
from prelm_jax.finetuning import finetune
from prelm_jax.finetuning.config import FineTuning
from prelm_jax.finetuning.task import prepare_task
from prelm_jax.formats.base import LoadedModel, LoadedTask, save
from prelm_jax.models.bert import BertConfig
from prelm_jax.models.elmo import DIRECTIONS, ELMoConfig
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.models.heads import Label
from prelm_jax.run import Run
from prelm_jax.tokenizers.bpe import BPEConfig
from prelm_jax.tokenizers.wordpiece import WordPieceConfig
from prelm_jax.tokenizers.words import WordVocabularyConfig
from prelm_jax.training.loop import LoopConfig
from prelm_jax.training.optimizer import Adagrad, AdamW
from prelm_jax.training.sharding import MeshConfig
from prelm_jax.training.step import Keys
from prelm_jax.workdir import WorkDir

TOLERANCE = 1e-3  # nats
TITLES = {"bert": "BERT", "openai-gpt": "GPT-1", "elmo": "ELMo", "finetuning": "BERT, fine-tuned"}
COLORS = {"bert": "#1f6feb", "openai-gpt": "#bf8700", "elmo": "#8250df", "finetuning": "#1a7f37"}

Losses = dict[str, list[float]]  # "ours" and "torch": the loss of each step
LossOfBatch = Callable[[dict[str, torch.Tensor]], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which families, for how long; the sizes are those of `experiment`."""

    families: tuple[Literal["bert", "openai-gpt", "elmo", "finetuning"], ...] = ("bert", "openai-gpt", "elmo")
    steps: int = 500
    init_from: Path | None = None  # Directory of a BERT, for finetuning.
    train: Path | None = None  # For finetuning: a TSV with the columns sentence and label.
    threads: int = 1
    json: Path | None = None
    picture: Path | None = None


def experiment(family: str, steps: int) -> Run:
    """A run of 2 layers of 128 (ELMo: LSTMs of 256), its schedule as long as itself."""
    plain = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "initializer_range": 0.05}
    sizes = {"hidden_size": 128, "num_layers": 2, "num_heads": 2} | plain
    # At a higher rate PyTorch in fp32 and in float64 differ by 1e-2 after 100 steps; ours is nearer to float64.
    adamw = AdamW(2e-4, steps // 10, steps, eps=1e-6, weight_decay=0.01, bias_correction="none")
    run = Run(
        corpus=("python-docs",),
        held_out=0.0,
        tokenizer=WordPieceConfig(vocab_size=2048),
        model=BertConfig(intermediate_size=512, **sizes),
        data=PairsConfig(max_length=64, max_predictions=10),
        optimizer=adamw,
        batch_size=8,
        loop=LoopConfig(steps=steps, log_every=1, mesh=MeshConfig(devices=1)),
    )
    if family == "openai-gpt":
        run = dataclasses.replace(
            run,
            tokenizer=BPEConfig(num_merges=1500),
            model=GPTConfig(embedding_dropout=0.0, **sizes),
            data=WindowsConfig(max_length=64),
            optimizer=dataclasses.replace(
                adamw, learning_rate=5e-4, eps=1e-8, bias_correction="moments", decay="cosine"
            ),
        )
    if family == "elmo":
        filters = ((1, 16), (2, 16), (3, 32), (4, 64))
        run = dataclasses.replace(
            run,
            tokenizer=WordVocabularyConfig(vocab_size=8000),
            model=ELMoConfig(filters=filters, num_highways=1, projection_size=64, hidden_size=256, dropout=0.0),
            data=StreamsConfig(max_length=20, num_negatives=1024),
            optimizer=Adagrad(0.02, unroll_steps=20),
        )
    return run


def compare(run: Run, directory: Path) -> Losses:
    """Trains a run in a new directory, and the same model in PyTorch."""
    pretraining.pretrain(run, directory / "run")
    metrics = WorkDir(directory / "run").read_metrics()
    prepared = pretraining.prepare(run)
    config = pretraining.with_vocabulary(run.model, prepared.tokenizer)
    params = jax.jit(config.build().init_params)(Keys.from_seed(run.seed).init)
    initial = LoadedModel(config, params, prepared.tokenizer)
    batches = run.data.build(prepared.training, prepared.tokenizer, run.batch_size, run.seed)
    model, loss_of_batch = PEERS[config.model_type](initial, run.batch_size, directory / "initial")
    ours = [line["train/loss"] for line in metrics if "train/loss" in line]
    return {"ours": ours, "torch": torch_losses(run, model, loss_of_batch, batches)}


def fine_tuning(settings: Settings, directory: Path) -> FineTuning:
    """finetuning:classify without dropout, its schedule as long as itself; a few examples are held out."""
    if settings.init_from is None or settings.train is None:
        raise SystemExit("finetuning needs --init-from and --train")
    encoder, dev = directory / "encoder", directory / "dev.tsv"
    shutil.copytree(settings.init_from, encoder)
    config = json.loads((encoder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (encoder / "config.json").write_text(json.dumps(config))
    lines = settings.train.read_text().splitlines(keepends=True)
    dev.write_text("".join(lines[:65]))
    run = cast(FineTuning, load_run_or_task("finetuning:classify")[1])
    return dataclasses.replace(
        run,
        epochs=settings.steps * run.batch_size / (len(lines) - 1),
        head=Label(dropout=0.0),
        init_from=str(encoder),
        train=str(settings.train),
        dev=str(dev),
        columns=Columns("sentence"),
        loop=LoopConfig(steps=settings.steps, log_every=1, mesh=MeshConfig(devices=1)),
    )


def compare_finetuning(run: FineTuning, directory: Path) -> Losses:
    """Fine-tunes BERT for labels, and transformers' model from the same initial weights, the head's among them."""
    finetune.finetune(run, directory / "run", seeds=1)
    metrics = WorkDir(directory / "run" / "seed-0").read_metrics()
    task = prepare_task(run)
    fresh = jax.jit(task.config.build().init_params)(Keys.from_seed(run.seed).init)
    initial = LoadedTask(task.config, task.initial_params(fresh), task.frame.tokenizer, frozenset(), task.names, None)
    save(initial, find_family("bert", directory).format, directory / "initial", "")
    model = transformers.BertForSequenceClassification.from_pretrained(directory / "initial").train()

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        tokens, types, segments = (batch[name][:, 0] for name in ("tokens", "token_types", "segments"))
        return model(tokens, attention_mask=segments, token_type_ids=types, labels=batch["labels"][:, 0]).loss

    batches = TaskBatches(task.frame, task.train_rows, run.batch_size, run.seed)  # Ours, before they are packed.
    ours = [line["train/loss"] for line in metrics if "train/loss" in line]
    return {"ours": ours, "torch": torch_losses(task.run, model, loss, batches)}


def torch_losses(
    run: Run | FineTuning, model: torch.nn.Module, loss_of_batch: LossOfBatch, batches: Any
) -> list[float]:
    """The loss of each step of a training loop in PyTorch."""
    config, losses = run.optimizer, []
    optimizer = torch_optimizer(config, model)
    for step in range(run.loop.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(config, step)
        batch = {
            name: torch.from_numpy(x.astype(np.int64) if x.dtype == np.int32 else x)
            for name, x in batches[step].items()
        }
        optimizer.zero_grad()
        loss = loss_of_batch(batch)
        (loss * getattr(config, "unroll_steps", 1)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def rate(config: AdamW | Adagrad, step: int) -> float:
    """The learning rate of a step, counted from 0."""
    if isinstance(config, Adagrad):
        return config.learning_rate
    passed = step / config.decay_steps
    decay = {"linear": 1 - passed, "cosine": 0.5 * (1 + math.cos(math.pi * passed))}[config.decay]
    value = config.learning_rate * (step / config.warmup_steps if step < config.warmup_steps else decay)
    if config.bias_correction == "rate":  # openai/finetune-transformer-lm, opt.py
        value *= math.sqrt(1 - config.b2 ** (step + 1)) / (1 - config.b1 ** (step + 1))
    return value


def torch_optimizer(config: AdamW | Adagrad, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a config; weight decay on everything but vectors."""
    if isinstance(config, Adagrad):
        return torch.optim.Adagrad(model.parameters(), initial_accumulator_value=config.initial_accumulator, eps=0.0)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    options = {"lr": 0.0, "betas": (config.b1, config.b2), "eps": config.eps}
    return (torch.optim.AdamW if config.bias_correction == "moments" else UncorrectedAdam)(groups, **options)


class UncorrectedAdam(torch.optim.Optimizer):
    """AdamWeightDecayOptimizer of google-research/bert, optimization.py."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any):
        super().__init__(groups, options)

    @torch.no_grad()
    def step(self) -> None:
        """Updates the parameters."""
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                m, v = self.state[p].setdefault("moments", (torch.zeros_like(p), torch.zeros_like(p)))
                m.mul_(b1).add_((1 - b1) * p.grad)
                v.mul_(b2).add_((1 - b2) * p.grad**2)
                p -= group["lr"] * (m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p)


def torch_bert(initial: LoadedModel, rows: int, directory: Path) -> tuple[torch.nn.Module, LossOfBatch]:
    """transformers' BERT with the initial weights."""
    save(initial, find_family("bert", directory).format, directory, "")
    model = transformers.BertForPreTraining.from_pretrained(directory).train()

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = torch.full_like(batch["tokens"], -100)
        row, slot = batch["masked_weights"].nonzero(as_tuple=True)
        labels[row, batch["masked_positions"][row, slot]] = batch["masked_targets"][row, slot]
        return model(
            input_ids=batch["tokens"],
            token_type_ids=batch["token_types"],
            position_ids=batch["positions"],
            attention_mask=batch["segments"],
            labels=labels,
            next_sentence_label=batch["next_sentence_labels"],
        ).loss

    return model, loss


def torch_gpt(initial: LoadedModel, rows: int, directory: Path) -> tuple[torch.nn.Module, LossOfBatch]:
    """transformers' GPT-1 with the initial weights. Its layers are called one by one, to mask attention by segments."""
    save(initial, find_family("openai-gpt", directory).format, directory, "")
    model = transformers.OpenAIGPTLMHeadModel.from_pretrained(directory).train()
    decoder = model.transformer

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        segments_BT = batch["segments"]
        mask_B1TS = torch.where(segments_BT[:, :, None] == segments_BT[:, None], 0.0, -math.inf)[:, None]
        x_BTD = decoder.tokens_embed(batch["tokens"]) + decoder.positions_embed(batch["positions"])
        for layer in decoder.h:
            (x_BTD,) = layer(x_BTD, mask_B1TS)
        nll_G = F.cross_entropy(model.lm_head(x_BTD).flatten(0, 1), batch["targets"].flatten(), reduction="none")
        weights_G = batch["weights"].flatten()
        return (nll_G * weights_G).sum() / weights_G.sum()

    return model, loss


def torch_elmo(initial: LoadedModel, rows: int, directory: Path) -> tuple[torch.nn.Module, LossOfBatch]:
    """torch_elmo.py with the initial weights."""
    config, params = initial.config, initial.params
    model = TorchELMo(config, rows)
    encoder, ours = model.encoder, params["encoder"]
    pairs = [(encoder.characters.weight, params["characters"]["embedding"])]
    for i, convolution in enumerate(encoder.convolutions):
        kernel = ours[f"convolution_{i}"]["kernel"].transpose(2, 1, 0)
        pairs += [(convolution.weight, kernel), (convolution.bias, ours[f"convolution_{i}"]["bias"])]
    dense = [(encoder.projection, ours["projection"])]
    for i, layers in enumerate(zip(encoder.carries, encoder.transforms, strict=True)):
        dense += zip(layers, (ours[f"highway_{i}"][name] for name in ("carry", "transform")), strict=True)
    for layer, weights in dense:
        pairs += [(layer.weight, weights["kernel"].T), (layer.bias, weights["bias"])]
    for direction, stack in zip(DIRECTIONS, model.stacks, strict=True):
        for i, layer in enumerate(stack):
            weights = params[direction][f"layer_{i}"]
            of_input, recurrent = np.split(np.asarray(weights["kernel"]).T, 2, 1)
            pairs += [(layer.input.weight, of_input), (layer.recurrent.weight, recurrent)]
            pairs += [(layer.input.bias, weights["bias"]), (layer.projection.weight, weights["projection"]["kernel"].T)]
    table, bias = (params["softmax"][name][: config.vocab_size] for name in ("embedding", "bias"))
    pairs += [(model.table.weight, table), (model.bias, bias)]
    for theirs, array in pairs:
        assert theirs.shape == array.shape
        theirs.data = torch.from_numpy(np.array(array))
    assert {id(theirs) for theirs, _ in pairs} == {id(p) for p in model.parameters()}
    return model, model


PEERS = {"bert": torch_bert, "openai-gpt": torch_gpt, "elmo": torch_elmo}


def draw(results: dict[str, Losses], path: Path) -> None:
    """Draws the losses of both sides, and their differences. The same results give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "prelm_jax"
    import matplotlib.pyplot as plt

    figure, (curves, differences) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    for family, losses in results.items():
        ours, theirs = (np.array(losses[side]) for side in ("ours", "torch"))
        curves.plot(ours, color=COLORS[family], linewidth=2.5, alpha=0.6, label=f"{TITLES[family]}, prelm_jax")
        curves.plot(theirs, color="black", linewidth=0.6, linestyle="--")
        label = f"{TITLES[family]}, at most {np.abs(ours - theirs).max():.1e}"
        differences.semilogy(np.maximum(np.abs(ours - theirs), 1e-7), color=COLORS[family], linewidth=0.8, label=label)
    curves.plot([], color="black", linewidth=0.6, linestyle="--", label="PyTorch")
    curves.set_ylabel("training loss, nats", fontsize=8)
    differences.axhline(TOLERANCE, color="#8b949e", linestyle="--", linewidth=1)
    differences.set_ylim(bottom=1e-8)
    differences.set_ylabel("difference of the losses, nats", fontsize=8)
    for axis in (curves, differences):
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")


def main(settings: Settings) -> None:
    harness.limit_threads(settings.threads)
    fields = dataclasses.asdict(settings) | {"json": None, "picture": None, "init_from": None, "train": None}
    record = {"machine": harness.machine(), "settings": fields, "results": {}}
    harness.print_machine(record["machine"])
    gaps = {}
    for family in settings.families:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            if family == "finetuning":
                losses = compare_finetuning(fine_tuning(settings, directory), directory)
            else:
                losses = compare(experiment(family, settings.steps), directory)
            record["results"][family] = losses
        harness.write_json(settings.json, record)
        gap_S = np.abs(np.subtract(losses["ours"], losses["torch"]))
        gaps[family] = gap_S.max()
        first, *_, last = losses["ours"]
        steps = f"losses of {settings.steps} steps, from {first:.4f} to {last:.4f}"
        print(f"{TITLES[family]}: {steps}; largest difference {gap_S.max():.1e}, at step {gap_S.argmax()}", flush=True)
    if settings.picture is not None:
        draw(record["results"], settings.picture)
    if max(gaps.values()) > TOLERANCE:
        raise SystemExit(f"the losses differ by more than {TOLERANCE}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
