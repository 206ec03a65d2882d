"""Models from the Hugging Face hub, named hub:OWNER/NAME or hub:OWNER/NAME@REVISION, through its client and its cache.

The client's settings apply: HF_HOME is where models are kept, and with HF_HUB_OFFLINE=1 nothing else is looked at. Only
files that are read are fetched: settings, safetensors and the tokenizer.
"""

import os
from functools import partial
from pathlib import Path

from prelm_jax.errors import InputError, first_line

PREFIX = "hub:"
FILES = ("*.json", "model*.safetensors", "vocab.txt", "merges.txt", "spiece.model")
MODULES = "modules.json"  # Of sentence-transformers, whose modules are in folders: 1_Pooling.
MODULE_FILES = ("[0-9]_*/config.json", "[0-9]_*/model.safetensors")


def is_hub_name(path: str | os.PathLike) -> bool:
    """Whether a path names a model of the hub."""
    return str(path).startswith(PREFIX)


def fetch(name: str) -> tuple[str, Path]:
    """The name of a model with its exact revision, and the directory that it was fetched into.

    Without access to the hub, a model in the cache is taken as it is. Raises InputError where there is none.

        fetch("hub:google/bert_uncased_L-2_H-128_A-2")[0]  # "hub:google/bert_uncased_L-2_H-128_A-2@30b0a37c…"
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        download = partial(snapshot_download, repository, max_workers=4)
        directory = Path(download(revision=revision or None, allow_patterns=[*FILES], ignore_patterns=["*/*"]))
        if (directory / MODULES).is_file():
            download(revision=directory.name, allow_patterns=[*MODULE_FILES])
    except Exception as error:  # Its own types, those of its HTTP library and the system's.
        raise InputError(f"{name}: not to be had from the hub or its cache ({first_line(error)})") from None
    return f"{PREFIX}{repository}@{directory.name}", directory
