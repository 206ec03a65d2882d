from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelm_jax.data.masking import MaskingConfig
from prelm_jax.errors import InputError
from prelm_jax.validation import check

PAD, CLS, SEP, MASK, VOCAB_SIZE = 0, 1, 2, 3, 1000
TOKENIZER = SimpleNamespace(
    vocab_size=VOCAB_SIZE,
    mask_id=MASK,
    continuation=np.arange(VOCAB_SIZE) >= 600,  # from 600 on, subwords inside a word
)


def sequences(lengths, T, rng, inside=0.4):
    """Rows [CLS] … [SEP] … [SEP] of the given lengths, with a fraction of ids that are subwords inside a word."""
    tokens, candidates = np.full((len(lengths), T), PAD, np.int32), np.zeros((len(lengths), T), bool)
    for row, length in enumerate(lengths):
        ids = rng.integers(4, 600, length) + 400 * (rng.random(length) < inside)
        ids[[0, length // 2, length - 1]] = CLS, SEP, SEP
        tokens[row, :length] = ids
        candidates[row, :length] = True
        candidates[row, [0, length // 2, length - 1]] = False
    return tokens, candidates


def mask(config, tokens, candidates, lengths, M, seed=0, example=None):
    """The masked tokens and the batch's other keys."""
    tokens = tokens.copy()
    example = np.arange(len(tokens)) if example is None else example
    return tokens, config.build(TOKENIZER, M, seed)(tokens, candidates, np.asarray(lengths), example)


def words_of(tokens, candidates):
    """The words of one row, as lists of positions, in plain Python."""
    words = []
    for position in np.flatnonzero(candidates):
        if tokens[position] >= 600 and candidates[position - 1]:
            words[-1].append(position)
        else:
            words.append([position])
    return words


@st.composite
def problems(draw):
    T = draw(st.integers(8, 70))
    lengths = draw(st.lists(st.integers(5, T), min_size=1, max_size=6))
    config = MaskingConfig(
        probability=draw(st.sampled_from([0.05, 0.15, 0.5, 1.0])),
        mask=draw(st.sampled_from([0.0, 0.8, 1.0])),
        random=0.0,
        whole_word=draw(st.booleans()),
    )
    return config, T, lengths, draw(st.integers(1, T)), draw(st.integers(0, 2**40))


@given(problems())
def test_any_sequence(problem):
    config, T, lengths, M, seed = problem
    tokens, candidates = sequences(lengths, T, np.random.default_rng(seed))
    masked, result = mask(config, tokens, candidates, lengths, M, seed)
    assert {name: (a.shape, a.dtype) for name, a in result.items()} == {
        "masked_positions": ((len(lengths), M), np.int32),
        "masked_targets": ((len(lengths), M), np.int32),
        "masked_weights": ((len(lengths), M), np.float32),
    }
    for row, length in enumerate(lengths):
        positions, targets, weights = (result[f"masked_{name}"][row] for name in ("positions", "targets", "weights"))
        n = int(weights.sum())
        np.testing.assert_array_equal(weights, np.arange(M) < n)
        assert not positions[n:].any() and not targets[n:].any()
        positions = positions[:n]
        assert (np.diff(positions) > 0).all()
        assert candidates[row, positions].all()
        np.testing.assert_array_equal(targets[:n], tokens[row, positions])
        restored = masked[row].copy()
        restored[positions] = targets[:n]
        np.testing.assert_array_equal(restored, tokens[row])
        if config.mask in (0.0, 1.0):
            assert (masked[row, positions] == (MASK if config.mask else targets[:n])).all()

        budget = min(M, max(1, round(length * config.probability)))
        if config.whole_word:
            chosen = set(positions.tolist())
            words = [word for word in words_of(tokens[row], candidates[row]) if chosen.intersection(word)]
            assert [position for word in words for position in word] == positions.tolist()
            assert n <= budget
            others = [word for word in words_of(tokens[row], candidates[row]) if not chosen.intersection(word)]
            # No word that would still fit is left.
            assert all(len(word) > budget - n for word in others)
        else:
            assert n == min(budget, candidates[row].sum())


@pytest.mark.parametrize("whole_word", [False, True])
def test_pure_in_seed_and_example(whole_word):
    lengths = np.full(32, 60)
    tokens, candidates = sequences(lengths, 64, np.random.default_rng(0))
    config = MaskingConfig(whole_word=whole_word)
    masked, result = mask(config, tokens, candidates, lengths, 10)
    part = slice(5, 20)
    again, again_result = mask(
        config, tokens[part], candidates[part], lengths[part], 10, example=np.arange(part.start, part.stop)
    )
    np.testing.assert_array_equal(again, masked[part])
    for name, array in result.items():
        np.testing.assert_array_equal(again_result[name], array[part])
    other, _ = mask(config, tokens, candidates, lengths, 10, seed=1)
    assert (other != masked).any(axis=1).all()


@pytest.mark.parametrize("whole_word", [False, True])
def test_statistics(whole_word):
    """15 % of the tokens, of these 80/10/10, and every position and every random token is equally likely."""
    B, T = 8000, 128
    tokens, candidates = sequences([T] * B, T, np.random.default_rng(0), inside=0.3 if whole_word else 0)
    masked, result = mask(MaskingConfig(whole_word=whole_word), tokens, candidates, [T] * B, 20)
    used = result["masked_weights"] > 0
    # round(128 · 0.15) = 19 tokens; whole words do not always add up to 19.
    np.testing.assert_allclose(used.sum(axis=1).mean(), 19, rtol=0.003 if whole_word else 0)
    now = np.take_along_axis(masked, result["masked_positions"], axis=1)[used]
    targets = result["masked_targets"][used]
    changed = (now != MASK) & (now != targets)
    for fraction, expected in (
        (np.mean(now == MASK), 0.8 + 0.1 / VOCAB_SIZE),
        (np.mean(changed), 0.1 * (1 - 2 / VOCAB_SIZE)),
        (np.mean(now == targets), 0.1 + 0.1 / VOCAB_SIZE),
    ):
        assert abs(fraction - expected) < 4 * np.sqrt(expected * (1 - expected) / used.sum())
    random = now[changed]
    assert random.min() == 0 and random.max() == VOCAB_SIZE - 1
    counts = np.bincount(random * 20 // VOCAB_SIZE, minlength=20)
    assert np.abs(counts - len(random) / 20).max() < 4 * np.sqrt(len(random) / 20)

    chosen = np.bincount(result["masked_positions"][used], minlength=T)[candidates[0]]
    expected = used.sum() / len(chosen)
    assert np.abs(chosen - expected).max() < 5 * np.sqrt(expected)
    if not whole_word:
        # Pairs of positions too: choosing one makes its neighbor no likelier.
        both = np.zeros((B, T), bool)
        both[np.nonzero(used)[0], result["masked_positions"][used]] = True
        pairs = (both[:, 1:-1] & both[:, 2:]).sum() / B
        p = 19 / 125 * 18 / 124
        neighbors = (candidates[0, 1:-1] & candidates[0, 2:]).sum()
        assert abs(pairs - neighbors * p) < 4 * np.sqrt(neighbors * p / B)


def test_a_subword_after_a_special_token_begins_a_word():
    tokens = np.array([[CLS, 700, 10, SEP, 701, 702, SEP, PAD]], np.int32)
    candidates = np.array([[False, True, True, False, True, True, False, False]])
    seen = set()
    for example in range(200):
        _, result = mask(
            MaskingConfig(probability=0.3, whole_word=True), tokens, candidates, [7], 2, example=np.array([example])
        )
        seen.add(tuple(result["masked_positions"][0][result["masked_weights"][0] > 0].tolist()))
    assert seen == {(1, 2), (4, 5)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 0.0}, "probability is 0.0"),
        ({"probability": 1.5}, "probability is 1.5"),
        ({"mask": 0.8, "random": 0.3}, "random is 0.3: .* mask, 0.8"),
        ({"mask": -0.1}, "mask is -0.1"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(InputError, match=message):
        check(MaskingConfig(**options))


@pytest.mark.parametrize(
    "without",
    [{**vars(TOKENIZER), "continuation": np.zeros(VOCAB_SIZE, bool)}, {"vocab_size": VOCAB_SIZE, "mask_id": MASK}],
)
def test_whole_words_need_subwords(without):
    with pytest.raises(InputError, match=r"masking\.whole_word"):
        MaskingConfig(whole_word=True).build(SimpleNamespace(**without), 20, 0)


def test_words_that_the_vocabulary_does_not_mark():
    """Tokens given as continuing a word are chosen with it, like subwords with ##, even in a vocabulary without ##."""
    tokens = np.array([[CLS, 700, 10, 11, 12, SEP, 13, 14, SEP, PAD]], np.int32)
    candidates = np.isin(tokens, [CLS, SEP, PAD], invert=True)
    continues = np.array([[False, False, False, True, True, True, True, True, False, True]])
    config = MaskingConfig(probability=1.0, whole_word=True, segmenter="jieba", mask=1.0, random=0.0)
    seen = set()
    for plain in (TOKENIZER, SimpleNamespace(**{**vars(TOKENIZER), "continuation": np.zeros(VOCAB_SIZE, bool)})):
        masking = config.build(plain, 3, 0)
        for example in range(200):
            result = masking(tokens.copy(), candidates, np.array([9]), np.array([example]), continues)
            seen.add(tuple(result["masked_positions"][0][result["masked_weights"][0] > 0].tolist()))
    # [700] and [13, 14], or [10, 11, 12].
    assert seen == {(1, 6, 7), (2, 3, 4)}


def test_a_segmenter_without_whole_words_is_refused():
    with pytest.raises(InputError, match=r'segmenter is "jieba".*whole_word'):
        check(MaskingConfig(segmenter="jieba"))
