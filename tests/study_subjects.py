"""A subject that knows words by heart."""

from prelm_jax.inference.base import SentenceScore
from prelm_jax.study.subjects import Origin


class WordSubject:
    """Scores a text by the sum of the values of its words; others are worth nothing and unknown."""

    name, family, num_layers, scoring = "words", "fake", 0, "sum of words"

    def __init__(self, model="0" * 8, directions=(), **values):
        self.origin, self.values, self.directions, self.asked = Origin(model), values, directions, []

    def score(self, texts):
        self.asked += texts
        for text in texts:
            words = text.replace(".", " .").split()
            total = float(sum(self.values.get(word, 0) for word in words))
            directions = {name: total * sign for name, sign in zip(self.directions, (2, -1), strict=False)}
            yield SentenceScore(total, len(words), sum(word not in self.values for word in words), directions)

    def embed(self, sentences):
        raise NotImplementedError
