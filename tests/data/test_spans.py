import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prelm_jax.data.spans import count_up, cut


def expected_spans(sizes, begin, end):
    """The spans of one row in plain Python: [(item, start, length), …]."""
    line = [(item, start) for item, size in enumerate(sizes) for start in range(size)]
    spans = []
    for item, start in line[begin:end]:
        if spans and spans[-1][0] == item:
            spans[-1][2] += 1
        else:
            spans.append([item, start, 1])
    return spans


@given(st.data(), st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_spans_of_any_rows(data, sizes):
    interval = st.tuples(st.integers(0, sum(sizes) - 1), st.integers(1, sum(sizes)))
    rows = data.draw(st.lists(interval.filter(lambda row: row[0] < row[1]), min_size=1, max_size=5))
    begin_B, end_B = np.array(rows).T
    spans = cut(np.append(0, np.cumsum(sizes)), begin_B, end_B)
    expected = [(number, *span) for row in rows for number, span in enumerate(expected_spans(sizes, *row))]
    found = np.stack([spans.number, spans.item, spans.start, spans.length], axis=1)
    assert found.tolist() == [list(span) for span in expected]


def test_count_up():
    assert count_up(np.array([2, 0, 3, 1])).tolist() == [0, 1, 0, 1, 2, 0]
