"""`evaluate` scores all of a text once: equal on any batch size and devices, and to counts by PyTorch and NumPy."""

import contextlib
import dataclasses
import itertools
import json
import shutil

import elmo_reference
import jax
import numpy as np
import pytest
import tiny

from prelm_jax import pretraining
from prelm_jax.errors import InputError
from prelm_jax.loading import load
from prelm_jax.pretraining import evaluate
from prelm_jax.run import RunRecord
from prelm_jax.workdir import WorkDir

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A training corpus and a test text of a hundred documents."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "corpus.txt").write_text(tiny.text(seed=0))
    (folder / "test.txt").write_text(tiny.text(seed=1, documents=100))
    return folder


@pytest.fixture(scope="module")
def workdir(family, texts, tmp_path_factory):
    """A run of seed 0 whose checkpoint, of step 2, has random parameters; not to be changed."""
    run = dataclasses.replace(tiny.FAMILIES[family](), corpus=(f"{texts}/corpus.txt",))
    prepared = pretraining.prepare(run)
    corpus, tokenizer = prepared.corpus, prepared.tokenizer
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=tokenizer.vocab_size))
    workdir = WorkDir(tmp_path_factory.mktemp("runs") / family)
    workdir.claim(RunRecord.from_run(run, corpus.fingerprint, tokenizer.fingerprint), tokenizer)
    params = jax.jit(run.model.build().init_params)(jax.random.key(0))
    scale = 1 if family == "elmo" else 4  # Fresh Transformers would predict all tokens alike.
    params = jax.tree.map(lambda x: scale * x, params)
    with contextlib.closing(workdir.open_checkpoints(keep=1)) as checkpoints:
        checkpoints.save(2, {"params": params})
    return workdir.path


@pytest.fixture(scope="module")
def expected(workdir, texts):
    """Batches of 8 rows on one device."""
    return evaluate(workdir, (f"{texts}/test.txt",), devices=1)


def assert_equal(found, expected):
    assert found.evaluation.keys() == expected.evaluation.keys()
    for name, value in expected.evaluation.items():
        np.testing.assert_allclose(found.evaluation[name], value, rtol=1e-6, err_msg=name)
    assert found.targets == expected.targets and found.baselines == expected.baselines
    assert (found.share, found.step) == (expected.share, expected.step) == (1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (8, 2), (64, 8)])
def test_batch_size_and_devices_do_not_matter(workdir, texts, expected, batch_size, devices):
    assert_equal(evaluate(workdir, (f"{texts}/test.txt",), batch_size=batch_size, devices=devices), expected)


def test_options_of_the_training_do_not_matter(workdir, texts, expected, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(workdir, changed)
    record = json.loads((changed / "run.json").read_text())
    record["loop"]["evaluate_batches"], record["identity"]["batch_size"], record["identity"]["seed"] = 7, 64, 5
    (changed / "run.json").write_text(json.dumps(record))
    found = evaluate(changed, (f"{texts}/test.txt",), devices=8)
    if "next_sentence_accuracy" in found.baselines:  # Training examples, of the run's seed, vote on it.
        found.baselines["next_sentence_accuracy"] = expected.baselines["next_sentence_accuracy"]
    assert_equal(found, expected)


def test_a_sample_is_a_part_and_says_so(workdir, texts, expected):
    found = evaluate(workdir, (f"{texts}/test.txt",), sample=0.25, devices=1)
    assert found.share == pytest.approx(0.25, rel=0.05)
    for name, targets in found.targets.items():
        assert targets == pytest.approx(0.25 * expected.targets[name], rel=0.2)
    assert found.evaluation["loss"] == pytest.approx(expected.evaluation["loss"], rel=0.1)
    assert found.baselines != expected.baselines
    for sample in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(InputError, match=rf"sample is {sample}: ".replace("nan", "NaN")):
            evaluate(workdir, sample=sample)


def test_a_text_of_a_few_words_is_enough(workdir, tmp_path):
    (tmp_path / "short.txt").write_text("The cat sees a dog.\n")
    found = evaluate(workdir, (str(tmp_path / "short.txt"),), devices=1)
    assert 0 < max(found.targets.values()) < 20
    assert np.isfinite(list(found.evaluation.values())).all()


@pytest.mark.parametrize("family", ["openai-gpt"], indirect=True, scope="module")
def test_gpt_equals_a_count_over_all_tokens_by_pytorch(workdir, texts, expected, tmp_path):
    """Document by document, each window alone, with the exported model."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pretraining.export(workdir, tmp_path / "exported")
    model = transformers.OpenAIGPTLMHeadModel.from_pretrained(tmp_path / "exported").eval()
    encode = load(workdir).tokenizer.encode_batch
    T = 32
    windows, filled = [], 0  # `filled`: targets in the windows that documents share
    documents = encode((texts / "test.txt").read_text().split("\n\n"))
    for ids in documents:
        ids = list(ids)
        while len(ids) > T:
            windows.append(ids[: T + 1])
            ids = ids[T:]
        while len(ids) > 1:
            room = T - filled % T
            windows.append(ids[: room + 1])
            filled += len(windows[-1]) - 1
            ids = ids[room:]
    total = 0.0
    with torch.no_grad():
        for ids in windows:
            logits = model(torch.tensor([ids[:-1]])).logits[0].double()
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
    targets = sum(map(len, documents)) - len(documents)
    assert expected.targets["lm_loss"] == targets == sum(len(ids) - 1 for ids in windows)
    np.testing.assert_allclose(expected.evaluation["perplexity"], np.exp(total / targets), rtol=1e-6)


@pytest.mark.parametrize("family", ["elmo"], indirect=True, scope="module")
def test_elmo_equals_a_count_over_all_words_by_numpy(workdir, tmp_path):
    """In float64, each stream from its first word to its last, without batches."""
    text = [line for line in tiny.text(seed=3, documents=50).lower().replace(".", "").splitlines() if line]
    (tmp_path / "text.txt").write_text("\n".join(text))
    found = evaluate(workdir, (f"{tmp_path}/text.txt,documents=line,sentences=line",), devices=1)

    model = load(workdir)
    vocabulary = model.tokenizer.tokens
    begin, end, unknown = (vocabulary.index(word) for word in ("<S>", "</S>", "<UNK>"))
    known = {word: id for id, word in enumerate(vocabulary)}
    sentences = [line.split() for line in text]
    spellings = {"<S>": [256], "</S>": [257]} | {word: [*word.encode()] for line in sentences for word in line}
    row_of = {word: row for row, word in enumerate(spellings)}
    characters = np.array([[258, *ids, 259, *[260] * (48 - len(ids))] for ids in spellings.values()])
    words = sum(map(len, sentences))
    positions = words + len(sentences)
    R = words // 400
    assert 1 < R <= 32
    batch, begins = {"characters": characters}, [r * positions // R for r in range(R + 1)]
    length = max(np.diff(begins))
    for direction, first, last, order in (("forward", begin, end, 1), ("backward", end, begin, -1)):
        bounded = [[("<S>", "</S>")[order < 0], *sentence[::order]] for sentence in sentences]
        inputs = [row_of[word] for line in bounded for word in line]
        targets = [x for line in bounded for x in [*(known.get(word, unknown) for word in line[1:]), last]]
        assert first == known[bounded[0][0]]

        def rows(line, dtype=int):
            padded = [[*line[a:b], *[0] * (length - (b - a))] for a, b in itertools.pairwise(begins)]
            return np.array(padded, dtype)

        batch |= {f"{direction}_words": rows(inputs), f"{direction}_targets": rows(targets)}
        batch[f"{direction}_weights"] = rows([1.0] * positions, float)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), model.params)
    carry = model.config.build().init_carry(R)
    sums, _ = elmo_reference.losses(params, model.config, batch, carry)
    for direction in ("forward", "backward"):
        assert found.targets[f"{direction}_loss"] == positions
        loss = sums[f"{direction}_loss"] / positions
        np.testing.assert_allclose(found.evaluation[f"{direction}_perplexity"], np.exp(loss), rtol=1e-6)
