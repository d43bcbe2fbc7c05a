"""Rows of files: where they stand, what is wrong with them, and that every bad one is named by file and line."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_rows import BAD_ROWS, BAD_TEXT, GOOD, GOOD_ROWS
from hypothesis import given, settings, strategies as st

from stepjax.errors import ConfigError
from stepjax.train.config.tune import DataSettings
from stepjax.train.data.files.opening import open_files
from stepjax.train.data.files.paths import data_files
from stepjax.train.data.files.records import RowFault, all_rows, read_row_at
from stepjax.train.data.files.strict_json import strict_object
from stepjax.train.data.files.text_records import open_json, open_lines
from stepjax.train.data.fingerprint import fingerprint
from stepjax.train.data.survey import RowReader, Survey, survey
from stepjax.train.data.turns import TrainOn

LINE = json.dumps(GOOD).encode()


def read(path: Path, *, train_on: TrainOn = "last") -> Survey:
    source = DataSettings(path=str(path), train_on=train_on)
    return survey(source, open_files(source.path, source.kind))


def lines_of(path: Path) -> list[int]:
    """The lines of the rows, as they are named."""
    records = open_files(str(path))
    return [int(records.where(number).rpartition(":")[2]) for number in range(len(records))]


@pytest.mark.parametrize("name", BAD_TEXT)
def test_every_line_that_is_wrong_as_text_is_named(tmp_path, name):
    text, words = BAD_TEXT[name]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([LINE, b"", b" \t\r", LINE, text, LINE]))
    (fault,) = read(file).faults
    assert str(fault).startswith(f"{file}:5: ")
    assert words in str(fault)
    str(fault).encode()  # a terminal can show it


@pytest.mark.parametrize("name", BAD_ROWS)
def test_every_row_that_is_wrong_in_what_it_says_is_named(tmp_path, name):
    row, words = BAD_ROWS[name]
    file, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    file.write_bytes(b"\r\n".join([LINE, b"", json.dumps(row).encode(), LINE]))
    array.write_text(json.dumps([GOOD, row, GOOD], indent=1))
    (fault,), (same,) = read(file).faults, read(array).faults
    assert str(fault).startswith(f"{file}:3: ")
    assert words in str(fault)
    assert (same.reason, same.where) == (fault.reason, f"{array}:{len(json.dumps([GOOD], indent=1).splitlines())}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (LINE, [1]),
        (LINE + b"\n", [1]),
        (b"\xef\xbb\xbf" + LINE + b"\r\n" + LINE, [1, 2]),  # a byte order mark
        (LINE + b"\r" + LINE + b"\r\r" + LINE, [1, 2, 4]),  # carriage returns alone
        (b"\n\n \t\n\x0b\x0c\n\xc2\xa0\n\xe2\x80\xa8\n\xef\xbb\xbf\n  " + LINE, [8]),  # white space of many alphabets
        (LINE.replace(b"2 + 3", "2\u2028+\u20283\u0085".encode()) + b"\n" + LINE, [1, 2]),  # no line ends of JSON
        (LINE + b"\r\r\n" + LINE, [1, 2]),
    ],
)
def test_lines_have_the_numbers_that_an_editor_shows(tmp_path, content, expected):
    file, packed = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.gz"
    file.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    assert lines_of(file) == lines_of(packed) == expected
    assert read(file).faults == read(packed).faults == []


def test_a_torn_archive_is_named_where_it_ends(tmp_path):
    rows = [json.dumps({"prompt": f"{random.Random(i).random()}", "completion": "a"}) for i in range(3000)]
    packed = gzip.compress("\n".join(rows).encode())
    file = tmp_path / "rows.jsonl.gz"
    for content in (packed[: len(packed) // 2], packed[:-6], packed[:1000] + b"\0\0\0\0" + packed[1004:], packed[:2]):
        file.write_bytes(content)
        faults = read(file).faults
        assert any("the gzip file is damaged or incomplete" in str(fault) for fault in faults)
        assert all(str(fault).startswith(f"{file}:") for fault in faults)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[\n1,\n{},\n]", ["2: holds a JSON number", "3: has no columns", "4: a comma stands before the end"]),
        (b'[\n{"prompt": "a"}\n{"prompt": "b"}]', ["3: no comma after a row"]),
        (b'[\n{"prompt": "a"},\n{"prompt": NaN},\n{"prompt": "b"}]', ["3: not readable as JSON (NaN"]),
        (b'[{"prompt": "a"},\n{"prompt": "b]", "c: 1},\n{"prompt": 2}\n]', ["2: not readable as JSON"]),
        (b'[{"prompt": "a"},\n{"prompt": }, {"prompt": 3}]', ["2: not readable", "2: prompt is 3"]),
        (b'[{"prompt": "a"},\n', ["2: the file ends inside its array"]),
        (b'[{"prompt": "a"}] \n\n x', ["3: the file continues after the end"]),
        (b'[{"prompt": "\xff"}]', ["1: not valid UTF-8"]),
        (b"[]", ["1: the file holds no rows"]),
        (b"", ["1: the file holds no rows"]),
        (b"\xff\xfe[\0", ["1: the file is UTF-16"]),
        (b'{"prompt": "a"}\n{"prompt": 3}', ["2: prompt is 3"]),  # JSON lines under another name
        (b'{\n"prompt":\n3}', ["1: prompt is 3"]),  # one row
    ],
)
def test_arrays_are_read_as_far_as_they_go(tmp_path, content, words):
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    faults = read(file).faults
    for fault, start in zip(faults, words, strict=True):
        assert str(fault).startswith(f"{file}:{start}")


@given(
    st.lists(
        st.dictionaries(st.text(max_size=5), st.recursive(st.text(), lambda x: st.lists(x, max_size=3)), max_size=3),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_arrays_and_lines_hold_the_same_rows(tmp_path_factory, rows, indent, escaped):
    folder = tmp_path_factory.mktemp("rows")
    text = json.dumps(rows, indent=indent, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    (folder / "a.json").write_bytes(text)
    lines = [json.dumps(row, ensure_ascii=escaped).encode("utf-8", "surrogatepass") for row in rows]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    array, file = open_json(folder / "a.json"), open_lines(folder / "a.jsonl")
    assert len(array) == len(file) == len(rows)
    for number, row in enumerate(rows):
        first, second = array.read(number, number + 1)[0], file.read(number, number + 1)[0]
        if isinstance(first, RowFault):
            assert isinstance(second, RowFault)
            assert first.reason.partition(",")[0] == second.reason.partition(",")[0]
        else:
            assert first == second == row


def test_a_folder_and_a_pattern_stand_for_their_files(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    for name in ("a.jsonl", "b/c.json", "b/deep/d.ndjson.gz", "README.md", ".hidden.jsonl", "b/notes.txt"):
        content = json.dumps([GOOD] if name.endswith("json") else GOOD).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert [file.name for file in data_files(str(tmp_path))] == ["a.jsonl", "c.json", "d.ndjson.gz"]
    assert [file.name for file in data_files(str(tmp_path / "*.jsonl"))] == ["a.jsonl"]
    assert [file.name for file in data_files(str(tmp_path / "**" / "*.gz"))] == ["d.ndjson.gz"]
    records = open_files(str(tmp_path))
    assert list(all_rows(records)) == [GOOD] * 3
    assert [records.where(number) for number in range(3)] == [
        f"{tmp_path / name}:1" for name in ("a.jsonl", "b/c.json", "b/deep/d.ndjson.gz")
    ]
    with pytest.raises(ConfigError, match="does not exist"):
        open_files(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"the ending '.txt' is not known, expected .jsonl"):
        open_files(str(tmp_path / "b" / "notes.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no file in the folder has a known ending"):
        open_files(str(tmp_path / "empty"))


def test_a_fingerprint_is_of_the_content(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "elsewhere.jsonl"
    first.write_bytes(LINE)
    second.write_bytes(LINE)
    known = fingerprint(DataSettings(path=str(first)))
    assert len(known) == 64
    assert known == fingerprint(DataSettings(path=str(second))) == fingerprint(DataSettings(path=str(first)))
    times = os.stat(first)
    first.write_bytes(LINE.replace(b"5", b"6"))
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size and time
    assert fingerprint(DataSettings(path=str(first))) != known
    assert fingerprint(DataSettings(path=str(second), held_out_path=str(first))) != known
    assert fingerprint(DataSettings()) == fingerprint(DataSettings(weight=2.0))
    assert fingerprint(DataSettings()) != fingerprint(DataSettings(shares={"add": 1.0}))


parquet = pytest.mark.parquet


# Values without a common type, which Arrow's columns cannot hold.
NO_ARROW = {"role of another type", "content of another type", "content without parts", "an image", "empty parts"}
# What a column without a type, or a null, tells otherwise.
NULLS = {"no messages", "no conversation"}


@parquet
@pytest.mark.parametrize("name", sorted(BAD_ROWS.keys() - NO_ARROW))
def test_every_bad_row_of_parquet_is_named(tmp_path, name):
    import pyarrow
    import pyarrow.parquet

    row, words = BAD_ROWS[name]
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), file)
    faults = read(file).faults
    assert [fault.where for fault in faults] == [f"{file}:1", f"{file}:2"]
    if name not in NULLS:
        assert words in str(faults[0])


@parquet
def test_parquet_holds_what_lines_hold(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"{i}", "completion": "a", "answer": None if i % 2 else str(i)} for i in range(5000)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    records = open_files(str(tmp_path / "a.parquet"))
    assert list(all_rows(records)) == rows
    assert read_row_at(records, 4321) == rows[4321]
    content = (tmp_path / "a.parquet").read_bytes()
    for torn in (content[: len(content) // 2], b"PAR1", b"", content[4:]):
        (tmp_path / "b.parquet").write_bytes(torn)
        (fault,) = read(tmp_path / "b.parquet").faults
        assert str(fault).startswith(f"{tmp_path / 'b.parquet'}:1: ")
    broken = pyarrow.array([b"good", b"\xff\xfe", b"good"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "c.parquet")
    (fault,) = read(tmp_path / "c.parquet").faults
    assert fault.where == f"{tmp_path / 'c.parquet'}:2"


@st.composite
def damaged_rows(draw) -> Any:
    """Rows of every form in which one value is another: of another type, missing, empty or doubled."""
    row = json.loads(json.dumps(draw(st.sampled_from(GOOD_ROWS))))
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(row)
    for _ in range(draw(st.integers(1, 2))):
        holder, key = draw(st.sampled_from(places))
        other = st.sampled_from([None, True, 0, 1.5, "", " ", "x", "[", [], [None], [[]], {}, {"x": 1}, ["x", "y"]])
        holder[key] = draw(other | st.just(row))
    return row


@given(damaged_rows())
@settings(max_examples=400)
def test_no_row_ends_a_check(row):
    """Whatever stands where, a row is either good or has a reason why not."""
    reader = RowReader(DataSettings(path="x", train_on="all"))
    try:
        text = json.dumps(row)
    except (ValueError, RecursionError):
        return  # a row that holds itself
    try:
        form, content, turns = reader.read(strict_object(text.encode()))
    except ValueError:  # and no other error
        return
    assert form
    assert all(content.messages[turn]["role"] == "assistant" for turn in turns)


def test_null_is_as_good_as_nothing(tmp_path):
    nulls = {"answer": None, "tools": None, "system": None, "input": None, "history": None, "label": None, "text": None}
    file = tmp_path / "rows.jsonl"
    rows = [nulls | row for row in GOOD_ROWS if "text" not in row]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert read(file, train_on="all").faults == []


def test_surveys_count_what_rows_are(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [GOOD, {"prompt": "a", "completion": "b"}, {"prompt": "a"}, {"text": "c"}, GOOD | {"answer": 5}]
    file.write_text("\n".join(map(json.dumps, rows)))
    result = read(file)
    assert result.forms() == {"messages": 2, "completion": 2, "text": 1}
    assert result.has_answer.tolist() == [True, True, False, True, True]
    assert result.has_target.tolist() == [True, True, False, True, True]
    same = result.questions[:, None] == result.questions[None, :]
    assert np.argwhere(np.triu(same, 1)).tolist() == [[0, 4], [1, 2]]
