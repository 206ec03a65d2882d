"""The fixtures of tiny models."""

from model_directories import (  # noqa: F401
    bert_directory,
    bert_reference,
    elmo_directory,
    elmo_with_softmax,
    gpt_directory,
    gpt_ids_of,
    gpt_reference,
    published,
    save_bert,
)
