"""Sentences of test sets are left out of a corpus, and nothing else is."""

import lzma

from prelm_jax.study.exclusion import data_files, exclude, normal

CORPUS = """\
The cat sleeps. Dogs don't bark here! It was late.
A bank of the river.

Only this one is tested.

Apples, he said, are red. Rain fell on Monday.
"""


def test_sentences_of_all_kinds_of_files_are_left_out(tmp_path):
    tests = tmp_path / "tests"
    (tests / "deep").mkdir(parents=True)
    (tests / "a.jsonl").write_text('{"sentence_good": "The cats sleep.", "sentence_bad": "The cat sleeps."}\n')
    (tests / "deep" / "b.tsv.xz").write_bytes(lzma.compress(b"3\tdogs do n't bark here !\t1\n"))
    (tests / "c.txt").write_text("a <b>bank</b> of the river . <eos>\n")
    (tests / "d.sgml").write_text(
        "<s snum=1>\n<wf pos=NN>Only</wf>\n<wf>this one</wf> <wf>is</wf> <wf>tested</wf>\n</s>\n"
    )
    (tests / "e.conllu").write_text("# text = Apples, he said, are red.\n1\tRain\t_\n")
    (tests / "f.csv").write_text('0,"It was late",1\n')
    (tests / "README.txt").write_text("Rain fell on Monday.\n")
    (tmp_path / "corpus.txt").write_text(CORPUS)
    found = exclude([str(tmp_path / "corpus.txt")], data_files(tests), tmp_path / "clean.txt")
    assert (tmp_path / "clean.txt").read_text() == "Rain fell on Monday.\n\n"
    assert found == (4, 1, 6)
    exclude([str(tmp_path / "corpus.txt")], [], tmp_path / "all.txt", words=5)
    assert (tmp_path / "all.txt").read_text().splitlines()[:2] == ["The cat sleeps.", "Dogs don't bark here!"]
    assert "Monday" not in (tmp_path / "all.txt").read_text()
    assert normal("It's 3 o'clock—now!") == normal("it ' s 3 o'clock - now")
