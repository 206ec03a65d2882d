"""What GPT-1 did to its books before it tokenised them (openai/finetune-transformer-lm, text_utils.py).

ftfy undoes broken encodings and straightens quotation marks; then dashes, ellipses and white space are made uniform,
and runs of most punctuation marks are set apart by spaces.
"""

import re

from prelm_jax.errors import InputError

_REPLACED = str.maketrans({"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"})
# Not the backslash: it is in the original's list, but the expression there, no raw string, does not say so.
_SET_APART = re.compile(r"""(([-~!";?+,)(/*\[\]}{|_])\2*)""")


def version() -> str:
    """What decides the cleaned text besides the text."""
    return _ftfy().__version__


def clean(text: str) -> str:
    """The text as the original's `ftfy.fix_text` and `text_standardize` leave it.

    Lines end with " \\n ", other white space is single spaces, and there is none at the edges. Raises InputError where
    ftfy is not installed.
    """
    return standardize(_ftfy().fix_text(text))


def standardize(text: str) -> str:
    """`text_standardize` of the original."""
    text = _SET_APART.sub(r" \1 ", text.translate(_REPLACED))
    # The original takes the newlines first, for which a long run of spaces costs time quadratic in its length.
    text = re.sub(r"[^\S\n]+", " ", text)
    return re.sub(r"\s*\n\s*", " \n ", text).strip()


def _ftfy():
    try:
        import ftfy
    except ImportError:
        raise InputError('cleaning=gpt needs ftfy: pip install "prelm_jax[cleaning]"') from None
    return ftfy
