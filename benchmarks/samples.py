"""What the demos say: masked words that BERT finds, and how much GPT-1 copies from its training text.

    python benchmarks/samples.py runs/bert-demo
    python benchmarks/samples.py runs/gpt1-demo

BERT: the share of SENTENCES whose word is among the five likeliest. GPT-1: of the 5-grams of words in continuations,
the share that the training text has, beside that of held-out text, which was not copied.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import prelm_jax
from prelm_jax.corpus.documents import Corpus

# Written before any model was asked.
SENTENCES = (
    "The function [returns] a list of strings.",
    "If the file does not [exist], an exception is raised.",
    "This [method] is called when the object is destroyed.",
    "Return [True] if the object is an instance of the class.",
    "A dictionary maps keys to [values].",
    "The first [argument] must be a string.",
    "Changed in [version] 3.8: the parameter was added.",
    "The [default] value is None.",
    "Open the [file] for reading and writing.",
    "Import the [module] before you use it.",
    "The iterator returns the next [item] of the sequence.",
    "It raises a [ValueError] if the number is negative.",
    "The optional argument specifies the [number] of bytes to read.",
    "Instances of this [class] are immutable.",
    "A subclass can [override] this method.",
    "The [length] of the list is returned by len().",
    "The loop is executed until the condition is [false].",
    "This function is [available] on Unix and Windows.",
    "The [name] of the variable is case sensitive.",
    "Use the with [statement] to close the file automatically.",
)

PROMPTS = ("The function", "If the file", "A class", "This module", "Changed in version")
TOKENS = 200  # Of a continuation.


def filled(directory: Path) -> None:
    """The share of SENTENCES whose word is among the five likeliest."""
    model, hits = prelm_jax.load(directory), 0
    for sentence in SENTENCES:
        before, _, rest = sentence.partition("[")
        word, _, after = rest.partition("]")
        tokens = [token for token, _ in model.fill(f"{before}[MASK]{after}", top_k=5)[0]]
        hits += word.lower() in tokens
        print("+" if word.lower() in tokens else "-", sentence, " ", " ".join(tokens))
    print(f"{hits} of {len(SENTENCES)} words are among the five likeliest")


def copied(directory: Path, temperature: float) -> None:
    """The share of the 5-grams of continuations that the training text has."""
    model = prelm_jax.load(directory)
    corpus = Corpus(("python-docs",), held_out=0.05)  # As the demo has it.
    training, held_out = ([each.text.split() for each in corpus.documents(side)] for side in ("training", "held_out"))
    known = {gram for words in training for gram in grams(words)}
    continuations = [model.generate(prompt, TOKENS, temperature).split() for prompt in PROMPTS]
    for name, texts in (("continuations", continuations), ("held-out text", held_out)):
        found = [gram in known for words in texts for gram in grams(words)]
        print(f"{name}: {sum(found) / len(found):.1%} of {len(found):,} 5-grams of words are in the training text")


def grams(words: list[str]) -> Iterator[tuple[str, ...]]:
    """The 5-grams of words."""
    return zip(*(words[i:] for i in range(5)), strict=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="model or work directory of bert:demo or gpt1:demo")
    parser.add_argument("--temperature", type=float, default=1.0, help="of GPT-1's continuations")
    arguments = parser.parse_args()
    if prelm_jax.load(arguments.directory).config.model_type == "bert":
        filled(arguments.directory)
    else:
        copied(arguments.directory, arguments.temperature)


if __name__ == "__main__":
    main()
