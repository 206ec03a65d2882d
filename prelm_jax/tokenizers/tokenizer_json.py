"""tokenizer.json, the file in which the `tokenizers` library keeps a vocabulary with its pipeline, as it is written."""

import copy
from collections.abc import Mapping

import tokenizers
from tokenizers import processors


def tokenizer_json(pipeline: tokenizers.Tokenizer, roles: Mapping[str, str]) -> str:
    """The content of tokenizer.json: `pipeline`, and the pairs of texts that readers expect of it.

    In a reader's hands `[CLS] A [SEP] B [SEP]` is put around a pair of texts if the vocabulary has these roles.
    """
    pipeline = copy.deepcopy(pipeline)
    if "cls" in roles:
        cls, sep = roles["cls"], roles["sep"]
        pipeline.post_processor = processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[(token, pipeline.token_to_id(token)) for token in (cls, sep)],
        )
    return pipeline.to_str(pretty=True)
