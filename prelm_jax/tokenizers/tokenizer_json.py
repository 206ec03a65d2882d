"""tokenizer.json, the file in which the `tokenizers` library keeps a vocabulary with its pipeline, as it is written."""

import copy
from collections.abc import Mapping

import tokenizers
from tokenizers import processors


def tokenizer_json(pipeline: tokenizers.Tokenizer, roles: Mapping[str, str]) -> str:
    """The content of tokenizer.json: `pipeline`, and the special tokens that readers put around texts.

    They are `[CLS] A [SEP] B [SEP]` if the vocabulary has these roles, and GPT's `bos A sep B cls` if it has bos too.
    """
    pipeline = copy.deepcopy(pipeline)
    bos, cls, sep = (roles.get(role) for role in ("bos", "cls", "sep"))
    if cls is not None and sep is not None:
        single, pair = f"{cls}:0 $A:0 {sep}:0", f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1"
        if bos is not None:
            single, pair = f"{bos}:0 $A:0 {cls}:0", f"{bos}:0 $A:0 {sep}:0 $B:0 {cls}:0"
        special = [(token, pipeline.token_to_id(token)) for token in (bos, cls, sep) if token is not None]
        pipeline.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    return pipeline.to_str(pretty=True)
