"""ELECTRA (Clark et al. 2020): a fourth family, outside the package, in one file.

A small generator fills masks; a discriminator predicts for every token whether it was replaced. Encoders, masked LM
head and batches are BERT's; loop, checkpoints and commands are the same for every family.

    prelm pretrain examples/electra.py:demo
    prelm evaluate examples/electra.py:demo --workdir runs/electra-demo

Reference: google-research/electra. Divergence: the norm of the embeddings is shared, too.
"""

import dataclasses
import math
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import Array

from prelm_jax.bounds import Bounds, NotNegativeFloat, Size
from prelm_jax.corpus.store import Store
from prelm_jax.data.masking import MaskingConfig
from prelm_jax.data.pairs import PairsConfig
from prelm_jax.models.bert import Bert, BertConfig, BertEmbeddings, BertEncoder, MaskedLMHead
from prelm_jax.models.cross_entropy import cross_entropy
from prelm_jax.models.language_model import LanguageModel
from prelm_jax.models.layers import Dense, gelu, truncated_normal
from prelm_jax.run import Run
from prelm_jax.tokenizers.wordpiece import WordPieceConfig
from prelm_jax.training.contract import Batch, HostBatch, Params, Sums
from prelm_jax.training.loop import LoopConfig
from prelm_jax.training.optimizer import AdamW


@dataclasses.dataclass(frozen=True)
class ElectraConfig(BertConfig):
    """Sizes of the discriminator, and the sizes of the generator where they differ."""

    model_type: ClassVar[str] = "electra"
    generator_hidden_size: Size = 64  # Width of the generator's hidden states.
    generator_num_heads: Size = 1  # Attention heads of the generator.
    generator_num_layers: Annotated[int, Bounds(0, 512)] = 12  # Layers of the generator; 0: a unigram model.
    replaced_token_weight: NotNegativeFloat = 50.0  # Weight of the discriminator's loss; the generator's has 1.

    def build(self, dtype: jnp.dtype = jnp.float32) -> "Electra":
        """The pretraining model, computing in `dtype`."""
        return Electra(self, dtype)

    @property
    def generator(self) -> BertConfig:
        """The generator, which is narrower than the discriminator."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(BertConfig)}
        width = self.generator_hidden_size
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "embedding_size": self.embedding_width}
        sizes |= {"num_heads": self.generator_num_heads, "num_layers": self.generator_num_layers}
        generator = BertConfig(**shared | sizes)
        generator.check_together()
        return generator


class Electra(LanguageModel):
    """Generator and discriminator on shared embeddings."""

    config: ElectraConfig
    dtype: jnp.dtype = jnp.float32

    replicated: ClassVar[tuple[str, ...]] = BertEncoder.replicated
    matrices: ClassVar[tuple[str, ...]] = BertEncoder.matrices

    def setup(self):
        c = self.config
        dense = truncated_normal(c.initializer_range)
        self.embeddings = BertEmbeddings(c, self.dtype)
        self.generator = BertEncoder(c.generator, self.dtype, self.embeddings)
        self.masked_lm = MaskedLMHead(c.generator)
        self.discriminator = BertEncoder(c, self.dtype, self.embeddings)
        self.replaced_token_transform = Dense(c.hidden_size, dense)
        self.replaced_token = Dense(1, dense)

    @property
    def coefficients(self) -> dict[str, float]:
        """The generator's loss, and the discriminator's with its weight."""
        return {"masked_lm_loss": 1.0, "replaced_token_loss": self.config.replaced_token_weight}

    def losses(self, batch: Batch, carry: Params, train: bool) -> tuple[Sums, Sums, Params]:
        """Both losses; the rate of replaced tokens, and how many tokens the discriminator tells right."""
        tokens_BT, positions_BM = batch["tokens"], batch["masked_positions"]
        targets_BM, weights_BM = batch["masked_targets"], batch["masked_weights"]
        hidden_BMD = jnp.take_along_axis(self.generator.hidden_states(batch, train)[-1], positions_BM[..., None], 1)
        logits_BMV = self.masked_lm(hidden_BMD, self.embeddings.word_embeddings.table)
        nll_BM, correct_BM = cross_entropy(logits_BMV, targets_BM)

        # No gradient goes through the choice of a token.
        sampled_BM = jax.random.categorical(self.make_rng("sample"), jax.lax.stop_gradient(logits_BMV))
        original_BT = _put(tokens_BT, positions_BM, targets_BM, weights_BM)
        corrupted_BT = _put(tokens_BT, positions_BM, sampled_BM.astype(tokens_BT.dtype), weights_BM)
        replaced_BT = (corrupted_BT != original_BT).astype(jnp.float32)
        last_BTD = self.discriminator.hidden_states({**batch, "tokens": corrupted_BT}, train)[-1]
        logits_BT = self.replaced_token(gelu(self.replaced_token_transform(last_BTD)))[..., 0].astype(jnp.float32)
        right_BT = ((logits_BT > 0) == (replaced_BT > 0)).astype(jnp.float32)
        masked, real_BT = weights_BM.sum(), (batch["segments"] != 0).astype(jnp.float32)

        def over_tokens(x_BT: Array) -> tuple[Array, Array]:
            return (x_BT * real_BT).sum(), real_BT.sum()

        nll_BT = optax.sigmoid_binary_cross_entropy(logits_BT, replaced_BT)
        losses = {"masked_lm_loss": ((nll_BM * weights_BM).sum(), masked), "replaced_token_loss": over_tokens(nll_BT)}
        metrics = {"masked_lm_accuracy": ((correct_BM * weights_BM).sum(), masked)}
        metrics |= {"replaced_token_accuracy": over_tokens(right_BT), "replaced_rate": over_tokens(replaced_BT)}
        return losses, metrics, carry

    def create_parameters(self) -> None:
        one = jnp.zeros((1, 1), jnp.int32)
        keys = ("tokens", "token_types", "positions", "segments", "masked_positions", "masked_targets")
        self.losses({**dict.fromkeys(keys, one), "masked_weights": one.astype(jnp.float32)}, {}, train=False)

    def weights(self, batch: Batch) -> dict[str, Array]:
        """The weight of each loss, from the batch alone."""
        real = (batch["segments"] != 0).sum().astype(jnp.float32)
        return {"masked_lm_loss": batch["masked_weights"].sum(), "replaced_token_loss": real}

    def check(self, batch: HostBatch) -> None:
        """Raises InputError where a batch asks for rows that the tables lack."""
        Bert(self.config, parent=None).check(batch)

    def flops(self, batch: Batch) -> float:
        """Matmul FLOPs of a training step: a BERT for the generator, and one without masked positions."""
        nothing = jax.ShapeDtypeStruct((len(batch["tokens"]), 0), jnp.int32)
        discriminator = Bert(self.config, parent=None).flops({**batch, "masked_positions": nothing})
        return Bert(self.config.generator, parent=None).flops(batch) + discriminator


@dataclasses.dataclass(frozen=True)
class ElectraDataConfig(PairsConfig):
    """BERT's batches without pairs, and the loss that a constant guess of the rate of replaced tokens reaches."""

    next_sentence: bool = False  # ELECTRA has no next-sentence loss.
    masking: MaskingConfig = dataclasses.field(default_factory=lambda: MaskingConfig(mask=1.0, random=0.0))

    def derived_metrics(self, name: str, value: float, store: Store) -> dict[str, float]:
        """Of the rate of replaced tokens its entropy (nats): the loss of a discriminator that knows nothing else."""
        if name == "replaced_rate":
            return {"constant_rate_loss": -sum(p * math.log(p) for p in (value, 1 - value) if p > 0)}
        return super().derived_metrics(name, value, store)


def demo() -> Run:
    """An ELECTRA for a coffee break: 2 layers of 128 on the prose that comes with every Python (2 MB).

    The generator has no layers (the paper's unigram generator, section 3.2): what it gets wrong is learned in minutes.
    Target: a replaced-token loss at least 10 % below that of a constant rate. Cost: 3 minutes on two CPU cores.

        prelm pretrain examples/electra.py:demo
    """
    return dataclasses.replace(
        small(),
        corpus=("python-docs",),
        held_out=0.05,
        tokenizer=WordPieceConfig(vocab_size=300),
        model=dataclasses.replace(
            ElectraConfig(num_layers=2, hidden_size=128, num_heads=2, intermediate_size=512, embedding_size=64),
            generator_num_layers=0,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            initializer_range=0.1,
        ),
        data=ElectraDataConfig(max_length=32, max_predictions=5),
        optimizer=AdamW(1e-3, warmup_steps=100, decay_steps=2400, eps=1e-6, weight_decay=0.01),
        batch_size=64,
        precision="float32",
        loop=LoopConfig(steps=2400, evaluate_every=400, save_every=800),
    )


def small() -> Run:
    """ELECTRA-small: 12 layers of 256, 14 million parameters of the discriminator.

    Paper: 1M steps of 128 sequences of 128 tokens, 4 days on one V100; GLUE average 79.9.

        prelm pretrain examples/electra.py:small --corpus 'corpus/*.txt'
    """
    return Run(
        corpus=("corpus/*.txt",),
        held_out=0.001,
        tokenizer=WordPieceConfig(vocab_size=30522),
        model=ElectraConfig(hidden_size=256, num_heads=4, intermediate_size=1024, embedding_size=128),
        data=ElectraDataConfig(max_length=128, max_predictions=20),
        optimizer=AdamW(5e-4, warmup_steps=10_000, decay_steps=1_000_000, eps=1e-6, weight_decay=0.01),
        batch_size=128,
        precision="bfloat16",
        loop=LoopConfig(steps=1_000_000, evaluate_every=5000, save_every=5000, log_every=100),
    )


def _put(tokens_BT: Array, positions_BM: Array, values_BM: Array, weights_BM: Array) -> Array:
    """The tokens with other values at some positions; slots of weight 0 leave what is there."""
    rows_B1 = jnp.arange(len(tokens_BT))[:, None]
    kept_BM = jnp.where(weights_BM > 0, values_BM, jnp.take_along_axis(tokens_BT, positions_BM, 1))
    return tokens_BT.at[rows_B1, positions_BM].set(kept_BM)
