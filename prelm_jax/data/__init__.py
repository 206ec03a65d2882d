"""Token ids to batches: what the models train on, as pure functions of (seed, step).

Letters at the end of a name are the axes of an array, as in `models/layers.py`, with three more:

    B rows of a batch           T positions of a row      M masked positions of a row
    K pairs packed into a row   V vocabulary              U distinct words of a batch
    C characters of a word      X documents               Y sentences
    R spans of contiguous text, of all rows end to end

A digit is an axis of that length. An interval is [begin, end): `end` is the index after its last element.
"""
