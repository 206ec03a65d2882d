"""Small corpora whose tokens all differ, and batches of pairs of them."""

from types import SimpleNamespace

import numpy as np
from hypothesis import strategies as st

from prelm_jax.corpus.store import Store
from prelm_jax.data.pairs import PairsConfig

PAD, CLS, SEP, MASK, FIRST_ID = 0, 1, 2, 3, 4


def corpus(sizes):
    """Documents of sentences of the given sizes; every token has its own id, counted up."""
    ids = iter(range(FIRST_ID, FIRST_ID + sum(map(sum, sizes))))
    return [[[next(ids) for _ in range(size)] for size in document] for document in sizes]


class Corpus:
    """Where each token id of `corpus` is, in plain Python, to check batches with."""

    def __init__(self, documents):
        self.documents = documents
        self.location = {
            id: (d, s, t)
            for d, document in enumerate(documents)
            for s, sentence in enumerate(document)
            for t, id in enumerate(sentence)
        }

    def document(self, id):
        return self.location[id][0]

    def is_end_of_sentence(self, id):
        d, s, t = self.location[id]
        return t == len(self.documents[d][s]) - 1

    def is_end_of_document(self, id):
        d, s, _ = self.location[id]
        return self.is_end_of_sentence(id) and s == len(self.documents[d]) - 1

    def is_beginning_of_sentence(self, id):
        return self.location[id][2] == 0

    def tokens(self, d):
        return sum(map(len, self.documents[d]))

    def segment(self, ids):
        """The document of a segment; checks that the segment is contiguous text."""
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        assert self.document(ids[0]) == self.document(ids[-1])
        return self.document(ids[0])


def tokenizer(vocab_size):
    return SimpleNamespace(
        vocab_size=vocab_size,
        pad_id=PAD,
        cls_id=CLS,
        sep_id=SEP,
        mask_id=MASK,
        tokens=["##" * (i % 3 == 0) + str(i) for i in range(vocab_size)],
        continuation=np.arange(vocab_size) % 3 == 0,
    )


def batches_of(documents, batch_size, seed=0, **options):
    vocab_size = FIRST_ID + sum(len(sentence) for document in documents for sentence in document)
    return PairsConfig(**options).build(Store.from_documents(documents), tokenizer(vocab_size), batch_size, seed)


def random_sizes(rng, documents, sentences, median=20):
    """Sizes in tokens of the sentences of each document; `sentences` are their numbers."""
    counts = np.broadcast_to(sentences, documents)
    return [np.clip(rng.lognormal(np.log(median), 0.5, n), 1, 200).astype(int).tolist() for n in counts]


def article_sizes(rng, documents):
    return random_sizes(rng, documents, np.maximum(1, rng.lognormal(2.3, 0.9, documents)).astype(int))


def rows_of_hosts(hosts, **options):
    """A batch of articles, after a check that the rows of all hosts are those of one."""
    sizes = article_sizes(np.random.default_rng(0), 50)
    expected = batches_of(corpus(sizes), 16, **options)[1000]
    batches = batches_of(corpus(sizes), 16, **options)
    batches.rows(3, 4, 8)  # leaves no state
    rows = [batches.rows(1000, i, i + 16 // hosts) for i in range(0, 16, 16 // hosts)]
    for name, array in expected.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in rows]), array)
        assert array.dtype == (np.float32 if name.endswith("weights") else np.int32)
        assert array.flags.c_contiguous
    return expected


def unmasked(batch):
    """The tokens before masking."""
    tokens = batch["tokens"].copy()
    rows, slots = np.nonzero(batch["masked_weights"])
    tokens[rows, batch["masked_positions"][rows, slots]] = batch["masked_targets"][rows, slots]
    return tokens


# Sizes of the sentences of documents.
_few_sentences = st.lists(st.integers(1, 40), min_size=1, max_size=6)
_short_sentences = st.integers(50, 150).map(lambda n: [1] * n)
corpora = st.lists(_few_sentences | _short_sentences, min_size=2, max_size=9)
