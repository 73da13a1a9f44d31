"Rows and files of prompts as people really have them: read as they are meant, or refused with one line."

import csv
import gzip
import json
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vgpo.prompts.__main__ import file_lines, in_one_line
from vgpo.prompts.files import check_rows, load_prompts, make_rows
from vgpo.rewards.geneval import TAGS, GenEvalRules, official_failures
from vgpo.rewards.ocr import target_text

CLAUSE = {"class": "cat", "count": 1}


def refusal(path):
    "The one line that a file is refused with."
    with pytest.raises(ValueError) as caught:
        load_prompts(path, "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- values of another type ---


@pytest.mark.parametrize("value", [3, 2.5, True, ["a", "b"], {"name": "a"}, float("nan"), []])
def test_a_tag_that_is_no_string_is_refused_where_it_stands(tmp_path, value):
    message = refusal(jsonl(tmp_path / "rows.jsonl", {"prompt": "a cat", "tag": "mine"}, {"prompt": "b", "tag": value}))
    assert "rows.jsonl, line 2: `tag` must be a string, not " in message and "leave it out" in message


def test_null_counts_as_absent(tmp_path):
    rows = [
        {"prompt": "a cat", "tag": None, "include": None, "exclude": None, "target": None},
        {"prompt": "a cat", "tag": "colors", "include": [CLAUSE | {"color": None, "position": None}], "exclude": None},
        {"prompt": "a cat", "tag": "counting", "include": [CLAUSE], "exclude": [CLAUSE | {"count": 2, "color": None}]},
        {"prompt": 'a sign that says "OPEN"', "target": None, "mine": None},
    ]
    read = load_prompts(jsonl(tmp_path / "rows.jsonl", *rows), "train")
    assert read == [
        {"prompt": "a cat"},
        {"prompt": "a cat", "tag": "colors", "include": [CLAUSE]},
        {"prompt": "a cat", "tag": "counting", "include": [CLAUSE], "exclude": [CLAUSE | {"count": 2}]},
        {"prompt": 'a sign that says "OPEN"', "mine": None},  # of an entry of one's own, None is a value
    ]
    assert official_failures({"cat": [type("Cat", (), {"color": "red"})()]}, read[1]) == []  # any colour will do
    assert target_text(read[3]["prompt"], read[3]) == "OPEN"


@pytest.mark.parametrize(
    "more",
    [
        {"include": "a cat"}, {"include": [None]}, {"include": [CLAUSE | {"count": "1"}]},
        {"include": [CLAUSE | {"count": 1.0}]},
        {"include": [CLAUSE | {"color": 3}]}, {"include": [CLAUSE], "exclude": "dogs"}, {"include": {"class": "cat"}},
        {"include": [CLAUSE | {"position": "above"}]}, {"include": [{"class": None, "count": 1}]},
        {"include": [CLAUSE, {"class": "dog", "count": 1, "position": ["above", "0"]}]},
    ],
)  # fmt: skip
def test_clauses_of_another_type_are_refused_where_they_stand(tmp_path, more):
    message = refusal(jsonl(tmp_path / "rows.jsonl", {"prompt": "x"}, {"prompt": "a cat", "tag": "colors"} | more))
    assert "rows.jsonl, line 2: GenEval row with prompt 'a cat': " in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1, {"a": float("-inf")}]])
def test_what_json_cannot_hold_is_refused(tmp_path, value):
    message = refusal(jsonl(tmp_path / "rows.jsonl", {"prompt": "a cat", "mine": value}))
    assert "rows.jsonl, line 1: JSON cannot hold the row" in message


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def function_rows(split, count=None):
    return ROWS


@pytest.mark.parametrize(
    "values",
    [deep(10_000), {1, 2}, b"bytes", Path("."), object(), {(1, 2): 3}, 1j, [float("nan")]],
    ids=lambda v: type(v).__name__,
)
def test_rows_of_a_function_hold_what_json_holds(monkeypatch, values):
    monkeypatch.setitem(globals(), "ROWS", [{"prompt": "a cat"}, {"prompt": "a dog", "mine": values}])
    with pytest.raises(ValueError, match=":function_rows, row 2: JSON cannot hold the row"):
        make_rows(f"{__name__}:function_rows", "train")
    monkeypatch.setitem(globals(), "ROWS", (row for row in [{"prompt": "a cat", "mine": (1, 2)}]))
    assert make_rows(f"{__name__}:function_rows", "train") == [{"prompt": "a cat", "mine": (1, 2)}]


# --- files of other formats ---

ROWS = [
    {"prompt": "a cat, a dog; both red", "tag": "pets"},
    {"prompt": 'the sign "OPEN"'},
    {"prompt": "two\nlines", "tag": "x"},
]


def table(path, delimiter=",", newline="\n", encoding="utf-8", names=("tag", "prompt")):
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, names, delimiter=delimiter, lineterminator=newline)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rows.csv", {}), ("rows.CSV", {"delimiter": ";", "newline": "\r\n"}), ("rows.tsv", {"delimiter": "\t"}),
        ("rows.csv", {"encoding": "utf-8-sig", "newline": "\r\n"}), ("rows.csv", {"delimiter": "\t"}),
        ("rows.tsv", {"delimiter": "\t", "names": ("prompt", "tag"), "newline": "\r\n"}),
    ],
)  # fmt: skip
def test_tables_are_read_by_their_columns(tmp_path, name, options):
    rows = load_prompts(table(tmp_path / name, **options), "train")
    assert rows == ROWS
    assert [row.where.rpartition(", ")[2] for row in rows] == ["line 2", "line 3", "line 4"]


def test_a_table_of_one_column(tmp_path):
    for name in ("rows.csv", "rows.tsv"):
        (tmp_path / name).write_text('prompt\na cat\n\n"a dog"\n')
        assert load_prompts(tmp_path / name, "train") == [{"prompt": "a cat"}, {"prompt": "a dog"}]
    for text in ("prompt,tag\na cat,\n,\n , \n", "prompt;tag\ra cat;\r"):  # spreadsheets leave rows of empty cells
        (tmp_path / "more.csv").write_text(text)
        assert load_prompts(tmp_path / "more.csv", "train") == [{"prompt": "a cat"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "prompt\na cat, a dog\n",
            "line 2: 2 cells, but line 1 names 1; put a text with ',' in it between double quotes",
        ),
        ("prompt,tag\na,b\nc,d,e\n", "line 3: 3 cells, but line 1 names 2"),
        (
            "caption,tag\na,b\n",
            "line 1: the columns are caption, tag; name each once, and that of the prompts `prompt`",
        ),
        ("prompt,tag,prompt\na,b,c\n", "name each once"),
        ("prompt,tag\n,b\n", "line 2: a row is an object with a non-empty string under `prompt`"),
        ('prompt,tag\n"a cat,b\nc,d\n', "not a table (unexpected end of data)"),
        ('prompt,tag\n"a" cat,b\n', "line 2: not a table"),
        ("prompt,tag\n", "holds no prompt"),
        ("", "line 1: the columns are ; name"),
        ("prompt,tag,include\na,colors,[]\n", "line 2: GenEval row with prompt 'a'"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "rows.csv").write_text(text)
    assert message in refusal(tmp_path / "rows.csv") and str(tmp_path / "rows.csv") in refusal(tmp_path / "rows.csv")


@pytest.mark.parametrize("indent", [None, 2, "\t"])
def test_json_files(tmp_path, indent):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS, indent=indent))
    rows = load_prompts(file, "train")
    assert rows == ROWS and rows[2].where == f"{file}, entry 3"
    file.write_text(json.dumps([row["prompt"] for row in ROWS], indent=indent))
    assert load_prompts(file, "train") == [{"prompt": row["prompt"]} for row in ROWS]
    file.write_text("\ufeff" + json.dumps(ROWS[0], indent=indent))
    assert load_prompts(file, "train") == ROWS[:1]
    file.write_text("\r\n".join(map(json.dumps, ROWS)))
    assert load_prompts(file, "train") == ROWS and load_prompts(file, "train")[1].where == f"{file}, line 2"
    (tmp_path / "rows.txt").write_text(json.dumps(ROWS, indent=indent))
    assert "rows.txt, line 1: " in refusal(tmp_path / "rows.txt") and "name such a file .json" in refusal(
        tmp_path / "rows.txt"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt": "a"}, {"prompt": 3}]', "rows.json, entry 2: a row is an object with a non-empty"),
        ('[\n {"prompt": "a"},\n]', "rows.json: not valid JSON (Expecting value at line 3, column 1)"),
        (
            '{"prompt": {"0": "a", "1": "b"}}',
            "rows.json, line 1: a row is an object with a non-empty",
        ),  # pandas' default
        ('{\n "prompts": ["a", "b"]\n}', "rows.json, entry 1: a row is an object with a non-empty"),
        ('[{"prompt": "a", "tag": "x", "tag": "y"}]', "the key 'tag' comes twice; keep one"),
        ("[]", "holds no prompt"),
        ("3", "entry 1: a row is an object"),
        ("a cat\n", "not valid JSON"),
    ],
)
def test_json_files_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "rows.json").write_text(text)
    assert message in refusal(tmp_path / "rows.json")


def saved(make):
    def save(path):
        with open(path, "wb") as file:
            make(file)

    return save  # fmt: skip


def workbook(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("rows.jsonl.gz", lambda path: gzip.open(path, "wt").write('{"prompt": "a"}\n'), "is compressed by gzip"),
        ("rows.xlsx", saved(workbook), "is a zip archive or a workbook such as .xlsx"),
        ("rows.txt", saved(workbook), "is a zip archive or a workbook such as .xlsx"),
        ("rows.png", lambda path: Image.new("RGB", (8, 8)).save(path), "is an image"),
        ("rows.jpg", lambda path: Image.new("RGB", (8, 8)).save(path), "is an image"),
        ("rows.parquet", lambda path: path.write_bytes(b"PAR1\x15\4\x15\xff"), "is a Parquet file"),
        ("rows.txt", lambda path: path.write_text("\n<!DOCTYPE html>\n<p>404"), "is a web page"),
        ("rows", lambda path: path.write_text('<?xml version="1.0"?><rows/>'), "is XML"),
        ("rows.yaml", lambda path: path.write_text("- a cat\n- a dog\n"), "is a .yaml file"),
        ("rows.ipynb", lambda path: path.write_text('{"cells": []}'), "is a .ipynb file"),
        ("rows.txt", lambda path: path.write_text("a cat\n", encoding="utf-16"), "line 1: not UTF-8 (but UTF-16)"),
        ("rows.csv", lambda path: path.write_text("prompt\na", encoding="utf-16"), "line 1: not UTF-8 (but UTF-16)"),
        ("rows.txt", lambda path: path.write_bytes("a cat\n".encode("utf-16-le")), "line 1: `prompt` holds '\\x00'"),
        ("rows.txt", lambda path: path.write_text("id,Prompt\n1,a cat\n"), "line 1: the names of a table's columns"),
        ("rows.txt", lambda path: path.write_text("prompt\ttag\na cat\tx\n"), "name such a file .csv or .tsv"),
        ("rows.txt", lambda path: path.write_text("a cat\n{'prompt': 'a dog'}\n"), "line 2: a JSON object"),
        ("rows.txt", lambda path: path.write_text('[\n  {\n    "prompt": "a'), "line 1: '[' is a piece of JSON"),
        ("rows.jsonl", lambda path: path.write_text('{"prompt": "a", "prompt": "b"}'), "the key 'prompt' comes twice"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_prompts_is_called_by_its_name(tmp_path, name, write, message):
    write(tmp_path / name)
    assert message in refusal(tmp_path / name) and str(tmp_path / name) in refusal(tmp_path / name)


def test_text_stays_text(tmp_path):
    "Lines that only look a little like another format are prompts."
    lines = [
        "[cat] and (dog)",
        "{a|b} cats",
        '"OPEN"; a sign',
        "a prompt, a cat",
        "[2 cats]",
        "$x^$ 100% \\n",
        "<b>bold</b>",
        "prompt",
    ]
    (tmp_path / "rows.txt").write_bytes("\r\n".join(lines).encode())
    assert [row["prompt"] for row in load_prompts(tmp_path / "rows.txt", "train")] == lines


# --- written again ---


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "two\nlines"}, {"prompt": " a cat"}, {"prompt": "a cat\u2028a dog"}, {"prompt": '{"a": 1}'},
        {"prompt": "["},
        {"prompt": 'a sign that says "CAT"', "target": "DOG"}, {"prompt": "a sign", "target": "CAT"},
    ],
)  # fmt: skip
def test_a_text_file_loses_nothing_of_a_row(row):
    assert not in_one_line(row)
    with pytest.raises(ValueError, match="no line can hold .*; write a .jsonl file"):
        file_lines([{"prompt": "a cat"}, row], Path("rows.txt"), "mine")
    assert json.loads(file_lines([row], Path("rows.jsonl"), "mine")[0]) == row


# --- whatever people bring ---

TEXTS = st.text(max_size=20) | st.sampled_from(
    ["a cat", "$$", 'says "OPEN"', "[", "{", '{"a"', "a\tb,c;d", "prompt", *TAGS]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
CLAUSES = st.fixed_dictionaries(
    {"class": VALUES, "count": st.just(1) | VALUES}, optional={"color": VALUES, "position": VALUES}
)
LOOSE_ROWS = VALUES | st.fixed_dictionaries(
    {"prompt": TEXTS},
    optional={
        "tag": st.sampled_from(TAGS) | VALUES, "target": VALUES, "negative_prompt": VALUES, "mine": VALUES,
        "include": st.lists(CLAUSES, max_size=2) | VALUES, "exclude": st.lists(CLAUSES, max_size=2) | VALUES,
    },
)  # fmt: skip
bounded = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class AnyGenEval:
    check_row = GenEvalRules.check_row


class AnyOCR:
    def check_row(self, row):
        target_text(row["prompt"], row)


def outcome(path):
    "The rows of a file, or None if one line that begins with its name refuses it."
    try:
        rows = load_prompts(path, "train")
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error), repr(error)
        return None
    for row in rows:
        tag = row.get("tag", "")
        assert row["prompt"].strip() and isinstance(tag, str)
        assert all(row.get(key, "") is not None for key in ("include", "exclude", "target"))
        assert json.loads(json.dumps(row, sort_keys=True, allow_nan=False)) == row
    for reward in (AnyGenEval(), AnyOCR()):
        try:
            check_rows(rows, reward)
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error), repr(error)
    return rows


@bounded
@given(
    st.lists(LOOSE_ROWS, min_size=1, max_size=3),
    st.sampled_from([".jsonl", ".json", ".txt", ".csv", ".tsv"]),
    st.sampled_from([None, 1]),
)
def test_any_rows_are_read_whole_or_refused(tmp_path, rows, suffix, indent):
    path = tmp_path / f"rows{suffix}"
    lines = map(json.dumps, rows)
    path.write_text(
        json.dumps(rows, indent=indent) if suffix == ".json" or indent else "\n".join(lines), encoding="utf-8"
    )
    read = outcome(path)
    assert read is None or len(read) == len(rows)
    if read and suffix != ".txt":
        given = [{"prompt": row} if isinstance(row, str) else row for row in rows]
        assert [row["prompt"] for row in read] == [row["prompt"] for row in given]
        for row, whole in zip(read, given, strict=True):  # nothing is lost but nulls
            assert all(
                row.get(key) == whole[key]
                for key in whole
                if key not in ("include", "exclude") or not isinstance(whole[key], list)
            )


@bounded
@given(
    st.lists(st.fixed_dictionaries({"prompt": TEXTS, "tag": TEXTS}), min_size=1, max_size=3),
    st.sampled_from("\t,;"),
    st.booleans(),
)
def test_any_table_is_read_whole_or_refused(tmp_path, rows, delimiter, dos):
    path = tmp_path / "rows.csv"
    try:
        with open(path, "w", newline="", encoding="utf-8") as file:
            options = {"delimiter": delimiter, "lineterminator": "\r\n" if dos else "\n", "quoting": csv.QUOTE_ALL}
            writer = csv.DictWriter(file, ("prompt", "tag"), **options)
            writer.writeheader()
            writer.writerows(rows)
    except UnicodeEncodeError:
        return
    read = outcome(path)
    if read is not None:
        full = [row for row in rows if row["prompt"].strip() or row["tag"].strip()]
        assert [row["prompt"].strip() for row in read] == [row["prompt"].strip() for row in full]
        assert [row.get("tag", "").strip() for row in read] == [row["tag"].strip() for row in full]


@bounded
@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda t: t.encode("utf-8", "ignore")),
       st.sampled_from(["", ".txt", ".jsonl", ".json", ".csv", ".tsv", ".gz"]))  # fmt: skip
def test_any_bytes_are_read_or_refused(tmp_path, content, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    rows = outcome(path)
    if rows and suffix in ("", ".txt", ".gz"):  # every line that is not empty is a prompt
        lines = content.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
        assert [row["prompt"] for row in rows] == [
            t for t in (line.removeprefix("\ufeff").strip() for line in lines) if t
        ]
