"""Sentences for the command line: the packaged ones, and users' files."""

import re

import pytest

from c3a.cli import data


def test_the_packaged_sentences_are_all_there_and_split_by_class():
    examples = data.rotten_tomatoes()
    assert len(examples) == 8530
    assert sum(examples.labels) == 4265
    train, validation, test = data.split(examples, seed=0)
    assert (len(train), len(validation), len(test)) == (5974, 852, 1704)
    assert (sum(validation.labels), sum(test.labels)) == (426, 852)
    texts = [set(part.texts) for part in (train, validation, test)]
    assert sum(map(len, (train, validation, test))) == 8530
    assert len(texts[0] & texts[2]) <= 5  # the set has a few sentences twice
    assert data.split(examples, seed=0)[2] == test
    assert data.split(examples, seed=1)[2] != test


def test_files_with_gaps_or_too_little_data_are_named(tmp_path):
    path = tmp_path / "gaps.csv"
    path.write_text("text,label\na,1\n,0\nb,\n")
    with pytest.raises(ValueError, match="2 rows lack a text or a label, first row 2"):
        data.read(path, "text", "label")
    few = data.Examples(["a"] * 12, [0] * 11 + [1], ["x", "y"])
    with pytest.raises(ValueError, match="at least 10 examples of each class, 'y' has 1"):
        data.split(few, seed=0)
    with pytest.raises(ValueError, match="at least 2 classes"):
        data.split(data.Examples(["a"] * 12, [0] * 12, ["x"]), seed=0)


def test_words_that_look_missing_or_like_numbers_stay_as_they_are(tmp_path):
    path = tmp_path / "words.csv"
    path.write_text("text,label\nNA,None\nnull,good\n")
    assert data.read(path, "text", "label") == data.Examples(
        ["NA", "null"], [0, 1], ["None", "good"]
    )
    path = tmp_path / "words.jsonl"
    path.write_text('{"text": "00", "label": 1}\n{"text": "01", "label": "x"}\n')
    assert data.read(path, "text", "label") == data.Examples(["00", "01"], [0, 1], ["1", "x"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "wide.csv",
            "text,label\na film,good,1\nb,bad,0\n",
            "row 1 has 3 fields, the header has 2",
        ),
        ("wide.csv", "text,label\na film,1\nb,c,0\n", "row 2 has 3 fields, the header has 2"),
        ("wide.tsv", "text\tlabel\na\t1\n\nb\tc\t0\n", "row 2 has 3 fields, the header has 2"),
        ("open.csv", 'text,label\na,1\n"b,0\n', "row 2: unexpected end of data"),
        ("twice.csv", "text,label,text\na,1,b\n", "expected one column of each name, 'text' is"),
        ("none.csv", "", "expected a header, the file is empty"),
        ("header.csv", "text,label\n", "expected rows, there is none"),
        ("latin.csv", b"text,label\nna\xefve,1\n", "expected text in UTF-8, byte 13 is 0xef"),
        ("bad.jsonl", '{"text": "a", "label": 1}\n\n{"text"\n', "row 2 is not JSON: "),
        ("deep.jsonl", "[" * 100_000, "row 1 is not JSON: "),
        ("list.json", '[{"text": "a", "label": 1}]', "an object a line, row 1 is a list"),
        ("none.jsonl", "", "expected rows, there is none"),
        ("latin.jsonl", b'{"text": "\xe9"}', "expected text in UTF-8, byte 10 is 0xe9"),
        (
            "names.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b", "label": "1"}',
            "labels 1 and '1' (row 2) would be two classes of one name",
        ),
        (
            "kinds.jsonl",
            '{"text": "a", "label": 1}\n{"text": ["b"], "label": 0}',
            "expected text or a number as 'text', row 2 has a list",
        ),
        (
            "kinds.jsonl",
            '{"text": "a", "label": {}}',
            "expected text or a number as 'label', row 1 has a dict",
        ),
        ("gaps.jsonl", '{"text": "a", "label": NaN}\n{"label": 1}', "2 rows lack a text or"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_the_row(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)):
        data.read(path, "text", "label")


def test_text_that_looks_like_numbers_stays_and_classes_are_ordered_by_value(tmp_path):
    path = tmp_path / "numbers.csv"
    path.write_text('\ufefftext,label\n007,10\n"1,5",9\n1e3,x\n', encoding="utf-8")
    assert data.read(path, "text", "label") == data.Examples(
        ["007", "1,5", "1e3"], [1, 0, 2], ["9", "10", "x"]
    )
    path = tmp_path / "values.jsonl"
    path.write_text('{"text": 7, "label": true}\n{"text": "b", "label": 1}\n')
    assert data.read(path, "text", "label") == data.Examples(["7", "b"], [1, 0], ["1", "True"])
