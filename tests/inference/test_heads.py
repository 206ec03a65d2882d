"""Fine-tuned models in use, beside transformers' classes and pipelines."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
import torch
import transformers
from model_directories import ELMO_OPTIONS, NAMES, elmo_weights, format_of, publish_elmo, read_task_of

from prelm_jax import load
from prelm_jax.data.examples import Answers, Example
from prelm_jax.errors import InputError
from prelm_jax.formats import bilm
from prelm_jax.formats.base import abstract_params, save
from prelm_jax.formats.heads import join
from prelm_jax.inference.bert import BertPretrained
from prelm_jax.inference.gpt import GPTPretrained
from prelm_jax.inference.heads import TaskPretrained
from prelm_jax.loading import load_encoder
from prelm_jax.models.heads import Label, Tags
from prelm_jax.models.task import TaskModelConfig
from prelm_jax.tokenizers.words import WordVocabulary
from prelm_jax.training.parameters import path_name

TEXTS = ["the cat sat on the mat.", "a mat", "", "the cat, the mat, the cat and the mat sat on!"]
LONG = "the cat sat on the mat and " * 8
PAIRS = [("the cat sat", "a mat"), ("", "on the mat"), ("cat", "the cat sat on the unmatable mat")]


def slow(*cases):
    """Cases for `make test-slow`: others like them are in every run."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.fixture(scope="session")
def exported(published, tmp_path_factory):
    """`exported(case)` is the directory that we write for a model of transformers; a GPT's tokenizer has the frame."""
    made = {}

    def get(case):
        if case not in made:
            task = read_task_of(case, published(case)[1])
            if case.startswith("gpt"):
                task = dataclasses.replace(task, tokenizer=task.tokenizer.framed())
            made[case] = tmp_path_factory.mktemp(case) / "model"
            save(task, format_of(case), made[case], "# A model\n")
        return made[case]

    return get


@pytest.fixture(scope="session")
def used(exported):
    """`used(case)` is that directory, loaded."""
    return functools.cache(lambda case: load(exported(case)))


def pipeline(task, directory, **options):
    return transformers.pipeline(task, model=str(directory), device="cpu", **options)


@pytest.mark.parametrize("case", ["label", *slow("labels", "number"), "gpt-label", *slow("gpt-number")])
def test_classify_is_the_pipeline_of_the_export(case, exported, used):
    model = used(case)
    assert isinstance(model, TaskPretrained) and model.kind == case.removeprefix("gpt-")
    classifier = pipeline("text-classification", exported(case), top_k=None)
    pairs = [{"text": a, "text_pair": b} for a, b in PAIRS]
    found = model.classify([*TEXTS, LONG, *PAIRS])
    options = {"truncation": True, "batch_size": 3}  # Padded, and several batches.
    theirs = [*classifier([*TEXTS, LONG], **options), *(classifier([pair], **options)[0] for pair in pairs)]
    for ours, scores in zip(found, theirs, strict=True):
        by_name = {each["label"]: each["score"] for each in scores}
        if model.kind == "number":
            assert ours.label == pytest.approx(by_name["LABEL_0"], abs=2e-5)
            continue
        np.testing.assert_allclose(ours.probabilities, [by_name[name] for name in NAMES], atol=2e-5)
        best = max(by_name, key=by_name.__getitem__)
        likely = tuple(name for name in NAMES if by_name[name] > 0.5)
        assert ours.label == (likely if model.kind == "labels" else best)


def test_tags_are_those_of_the_first_subword_of_each_word(exported, used):
    sentences = ["the cats sat on the unmatable mat .", "cat", "u.s. cats!", "the " * 30 + "cat"]
    model, tagger = used("tags"), pipeline("token-classification", exported("tags"))
    found = model.tag([*sentences[:3], sentences[3].split()])
    for words, ours in zip(map(str.split, sentences[:3]), found, strict=False):
        encoded = tagger.tokenizer(words, is_split_into_words=True, return_tensors="pt")
        first = [encoded.word_ids().index(i) for i in range(len(words))]
        logits = tagger.model(**encoded).logits[0, first].detach()
        assert ours.label == tuple(NAMES[i] for i in logits.argmax(-1))
        np.testing.assert_allclose(ours.probabilities, torch.softmax(logits, -1).max(-1).values, atol=2e-5)
    assert len(found[3].label) == 31  # More than the model has positions.
    # The pipeline that joins the subwords of a word, where words have no punctuation inside.
    groups = pipeline("token-classification", exported("tags"), aggregation_strategy="first", ignore_labels=[])(
        "the cats sat on the mat"
    )
    tagged = [group["entity_group"] for group in groups for _ in group["word"].split()]
    assert tagged == list(model.tag(["the cats sat on the mat"])[0].label)


def test_answers_are_those_of_the_exported_model(exported, used):
    question, passage = "the cat?", "the cat sat on the mat, the unmatable mat. on the mat sat cats! " * 3
    model = used("spans")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported("spans"))
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(exported("spans")).eval()
    room = 24 - len(tokenizer.tokenize(question)) - 3
    encoded = tokenizer(
        question,
        passage,
        truncation="only_second",
        max_length=24,
        stride=room - 7,  # Their stride is the overlap.
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length",
        return_tensors="pt",
    )
    offsets = encoded.pop("offset_mapping").tolist()
    encoded.pop("overflow_to_sample_mapping")
    outputs = theirs(**encoded)
    starts, ends = outputs.start_logits.detach().numpy(), outputs.end_logits.detach().numpy()
    assert len(starts) > 5
    best = {}
    for window, places in enumerate(offsets):
        inside = [i for i, each in enumerate(encoded.sequence_ids(window)) if each == 1]
        for start, end in itertools.product(inside, repeat=2):
            text = passage[places[start][0] : places[end][1]]
            best.setdefault(text, set()).add(round(float(starts[window, start] + ends[window, end]), 3))
    (found,), _ = model.predict([Example("0", ((question, passage),))], null_threshold=1e9, stride=7)
    assert found.candidates and found.label.texts[0] in passage
    for each in found.candidates:
        if each.text:
            assert passage[each.start :].startswith(each.text)
            assert any(abs(each.score - score) < 2e-3 for score in best[each.text]), each
    null = float((starts[:, 0] + ends[:, 0]).min())
    best_score = next(each.score for each in found.candidates if each.text == found.label.texts[0])
    assert found.null_difference == pytest.approx(null - best_score, abs=1e-4)
    (nothing,) = model.answer([(question, "")])
    assert (nothing.label, nothing.null_difference) == (Answers(), np.inf)


@pytest.mark.parametrize("case", [*slow("choice"), "gpt-choice"])
def test_choices_are_those_of_the_exported_model(case, exported, used):
    choices = [("the cat sat", ["on the mat", "a", "cats"]), ("the mat", ["sat", "the cat sat on the unmatable mat"])]
    model = used(case)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported(case))
    name = "BertForMultipleChoice" if case == "choice" else "OpenAIGPTDoubleHeadsModel"
    theirs = getattr(transformers, name).from_pretrained(exported(case)).eval()
    for (text, options), ours in zip(choices, model.choose(choices), strict=True):
        encoded = tokenizer([text] * len(options), options, padding=True, return_tensors="pt")
        inputs = {key: value[None] for key, value in encoded.items()}
        if case == "choice":
            logits = theirs(**inputs).logits[0]
        else:
            last = inputs["input_ids"].eq(tokenizer.cls_token_id).int().argmax(-1)
            logits = theirs(input_ids=inputs["input_ids"], mc_token_ids=last).mc_logits[0]
        np.testing.assert_allclose(ours.probabilities, torch.softmax(logits, -1).detach(), atol=2e-5)
        assert ours.label == int(logits.argmax())


# In any company


@pytest.fixture(scope="module")
def elmo(tmp_path_factory):
    """An ELMo with a CRF, from its directory."""
    directory = publish_elmo(tmp_path_factory.mktemp("elmo"), ELMO_OPTIONS, elmo_weights())
    encoder = dataclasses.replace(bilm.read(directory), tokenizer=WordVocabulary(["<S>", "</S>", "<UNK>"], True))
    config = TaskModelConfig(encoder.config, Tags(num_tags=3, crf=True, mix=True, lstm_size=6))
    save(with_random_head(config, encoder, NAMES), bilm.FORMAT, directory / "model", "# A model\n")
    return load(directory / "model")


def with_random_head(config, encoder, names, max_length=24):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract_params(config)["head"])
    by_path = {path_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(params)}
    return join(config, encoder, by_path, names, max_length)


def assert_same(found, expected):
    """Bit for bit."""
    for name in ("label", "probabilities", "candidates"):
        assert getattr(found, name) == getattr(expected, name)


def test_predictions_are_the_same_in_any_company(used, elmo):
    classifier = used("label")
    texts = [*TEXTS, LONG, *PAIRS, *(" ".join(["cat", "mat"] * (i % 7)) for i in range(100))]
    together = classifier.classify(texts)
    for i in (0, 3, 7, 60):
        assert_same(classifier.classify([texts[i]])[0], together[i])
    assert_same(classifier.classify(texts[::-1])[-1], together[0])
    sentences = ["the cat sat", "a", *(f"word{i} or a much longer word, {'x' * i}" for i in range(40)), LONG]
    together = elmo.tag(sentences)
    for i in (0, 1, 41, 42):
        alone = TaskPretrained(elmo.loaded, elmo.pretrained, type(elmo.frame))
        assert_same(alone.tag([sentences[i]])[0], together[i])
    assert len(together[42].label) == len(LONG.split())


# What a model cannot do


def test_a_task_is_asked_for_by_its_name(used, elmo):
    for case, wrong, right in (("label", "tag", "classify"), ("tags", "answer", "tag"), ("spans", "choose", "answer")):
        model = used(case)
        with pytest.raises(InputError, match=f"{model.kind}.*{wrong}.*{right}"):
            getattr(model, wrong)(["a"] if wrong == "tag" else [("a", "b")])
    with pytest.raises(InputError, match=r"example 0.*without words"):
        elmo.tag([" "])
    with pytest.raises(InputError, match="example 1 has no texts"):
        used("choice").choose([("a", ["b"]), ("a", [])])


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("classify", "A text.", "list"),
        ("classify", ["a", 3], "example 1 has 3"),
        ("classify", [("a", "b", "c")], "example 0 has 3 texts"),
        ("tag", "Some words", "list"),
        ("tag", [["Some", 3]], "example 0 has 3"),
        ("answer", "A question?", "list"),
        ("answer", ["Who?"], r"example 0 has 1 text.*\(question, passage\)"),
        ("choose", ["A text."], r"example 0.*\(text, \[option"),
        ("choose", [("A text.", "An option.")], r"example 0.*\(text, \[option"),
    ],
)
def test_what_is_asked_for_in_another_form_is_refused(used, method, given, expected):
    """A text alone, for example, which Python would read letter by letter."""
    case = {"classify": "label", "tag": "tags", "answer": "spans", "choose": "choice"}[method]
    with pytest.raises(InputError, match=expected):
        getattr(used(case), method)(given)


def test_a_gpt_without_a_frame_reads_the_last_token(gpt_ids_of, published):
    """As transformers does; there is nothing to read of a blank text."""
    reference, directory = published("gpt-label")
    model = load(directory)
    ids = gpt_ids_of("the cat sat")
    logits = reference(input_ids=torch.tensor([ids])).logits[0].detach()
    np.testing.assert_allclose(model.classify(["the cat sat"])[0].probabilities, torch.softmax(logits, -1), atol=2e-5)
    with pytest.raises(InputError, match=r"example 1 .*without tokens"):
        model.classify(["the cat", " "])


@pytest.mark.slow
def test_texts_that_were_encoded_apart_are_asked_for_as_trained(elmo):
    encoder = elmo.pretrained.loaded
    for pair, wrong in ((True, "a"), (False, ("a", "b"))):
        head = Label(num_labels=3, pair=pair, lstm_size=4)
        task = with_random_head(TaskModelConfig(encoder.config, head), encoder, NAMES)
        model = TaskPretrained(task, elmo.pretrained, type(elmo.frame))
        assert model.classify([("a", "b") if pair else "a"])[0].label in NAMES
        with pytest.raises(InputError, match=r"example 0 has . texts.*trained on"):
            model.classify([wrong])


def test_two_orders_of_a_pair_are_added(used):
    encoder = used("gpt-label").pretrained
    head = Label(num_labels=3, bias=False, pair=True)
    task = with_random_head(TaskModelConfig(encoder.config, head), encoder.loaded, NAMES)
    model = TaskPretrained(task, encoder, type(used("gpt-label").frame))
    forth, back = model.classify([("the cat", "a mat"), ("a mat", "the cat")])
    np.testing.assert_allclose(forth.probabilities, back.probabilities, atol=1e-6)


@pytest.mark.slow
def test_a_fine_tuned_model_still_embeds(exported, used, published):
    for case, kind in (("label", BertPretrained), ("gpt-label", GPTPretrained)):
        model, encoder = used(case), load_encoder(exported(case))
        assert type(encoder) is kind and type(model.pretrained) is kind
        (_, ours), (_, same) = *model.embed(["the cat"]), *encoder.embed(["the cat"])
        np.testing.assert_array_equal(ours, same)
    states = published("gpt-label")[0].transformer(
        input_ids=torch.tensor([used("gpt-label").tokenizer.encode_batch(["the cat"])[0]])
    )
    np.testing.assert_allclose(ours[-1], states.last_hidden_state[0].detach(), atol=2e-5)
