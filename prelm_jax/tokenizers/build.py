"""Builds a tokenizer from its configuration."""


def build(config, corpus):
    """The tokenizer of a configuration: trained on the corpus, or loaded."""
    return config.build(corpus)
