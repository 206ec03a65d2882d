"""GPT-1's cleaning of its books before tokenization (openai/finetune-transformer-lm, text_utils.py).

ftfy repairs broken encodings and straightens quotation marks. Then dashes, ellipses and white space are normalized, and
runs of most punctuation characters are surrounded by spaces.
"""

import re

_REPLACED = str.maketrans({"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"})
# Without the backslash: the original lists it, but in a string that is not raw, where it only escapes the next plus.
_SEPARATED = re.compile(r"""(([-~!";?+,)(/*[\]}{|_])\2*)""")


def version() -> str:
    """The version of ftfy, on which cleaned text depends."""
    import ftfy

    return ftfy.__version__


def clean(text: str) -> str:
    r"""The text after the original's `ftfy.fix_text` and `text_standardize`.

    Lines end with " \n ", other white space is single spaces, with none at the edges.
    """
    import ftfy  # Here: most corpora need no cleaning.

    return standardize(ftfy.fix_text(text))


def standardize(text: str) -> str:
    """The original's `text_standardize`. Example: `standardize("Well—so…") == "Well - so..."`."""
    text = _SEPARATED.sub(r" \1 ", text.translate(_REPLACED))
    # The original treats newlines first: quadratic in the length of a run of spaces.
    text = re.sub(r"[^\S\n]+", " ", text)
    return re.sub(r"\s*\n\s*", " \n ", text).strip()
