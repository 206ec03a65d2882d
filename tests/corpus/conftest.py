"""Short ways to write files and to read them as documents."""

import pytest

from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError


@pytest.fixture(scope="session")
def texts():
    """The texts of a corpus: `texts(*sources, side=None, **options)`."""

    def texts(*sources: str, side=None, **options) -> list[str]:
        return [document.text for document in Corpus(sources, **options).documents(side)]

    return texts


@pytest.fixture(scope="session")
def error_of(texts):
    """The message, one line, of the InputError that reading a corpus raises: `error_of(*sources, **options)`."""

    def error_of(*sources: str, **options) -> str:
        with pytest.raises(InputError) as error:
            texts(*sources, **options)
        message = str(error.value)
        assert "\n" not in message
        return message

    return error_of
