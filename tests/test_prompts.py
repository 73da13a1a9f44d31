import copy
import hashlib
import json
import os
import pickle
import sys
from collections import Counter

import pytest

from vgpo.prompts.files import MAX_CHARACTERS, PromptsConfig, check_rows, load_prompts, prompt_sources
from vgpo.prompts.tiny import TASK_WEIGHTS
from vgpo.rewards.geneval import TAGS, check_row
from vgpo.rewards.ocr import normalize, target_text

real = os.environ.get("VGPO_PROMPTS")
needs_files = pytest.mark.skipif(not real, reason="VGPO_PROMPTS does not name the folder of the public prompt files")


DIGESTS = {
    ("geneval", "train"): "2dac2b9c61ef0df8",
    ("geneval", "test"): "58cd5313ac41f1e3",
    ("ocr", "train"): "a3dde8400974ebc3",
    ("ocr", "test"): "85844881301a88a8",
    ("tiny-scenes", "train"): "864b583cedf76b25",
    ("tiny-scenes", "test"): "0973231f53374f54",
    ("tiny-words", "train"): "374df5daf3a3c1b2",
    ("tiny-words", "test"): "079de6cb210b0104",
}


class OCRRows:
    "Declares what the OCR reward needs, without an engine."

    def check_row(self, row):
        target_text(row["prompt"], row)


class GenEvalRows:
    check_row = staticmethod(check_row)


@pytest.mark.parametrize("source", prompt_sources())
def test_sources_are_seeded_and_their_splits_disjoint(source):
    train, test = load_prompts(source, "train"), load_prompts(source, "test")
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert load_prompts(source, "train") == train
    for count in (1, 500, 528, 4001):
        rows = load_prompts(source, "test", count)
        assert len(rows) == count and rows[:500] == test[: min(count, 500)]
        assert rows[-1].where == f"{source}, row {count}"
    unique = load_prompts(source, "test", unique=True)
    assert len({row["prompt"] for row in unique}) == len(unique) <= len(test)


def test_the_tiny_sources_have_as_many_rows_of_both_splits():
    for source in ("tiny-scenes", "tiny-words"):
        train, test = load_prompts(source, "train"), load_prompts(source, "test")
        assert len(train) == len(test) == 3000 > len(load_prompts(source, "test", unique=True))


def test_held_out_words_never_occur_in_training():
    words = [{row["target"] for row in load_prompts("tiny-words", split)} for split in ("train", "test")]
    assert words[0] and words[1] and not words[0] & words[1]


def test_the_held_out_scenes_have_equal_shares_of_tasks():
    tags = [row["tag"] for row in load_prompts("tiny-scenes", "test", 528)]
    assert {tag: tags.count(tag) for tag in TASK_WEIGHTS} == dict.fromkeys(TASK_WEIGHTS, 88)


def test_the_rows_of_sources_are_pinned():
    "Runs of the past stay repeatable only if these never change; nor may they depend on Python's randomised hashes."
    digests = {
        (source, split): hashlib.sha256(json.dumps(load_prompts(source, split)).encode()).hexdigest()[:16]
        for source in prompt_sources()
        for split in ("train", "test")
    }
    assert digests == DIGESTS


def my_rows(split, count=None):
    return [{"prompt": f"{split} {n}", "n": n} for n in range(count or 3)]


def no_rows(split, count=None):
    return []


def bad_rows(split, count=None):
    return [{"prompt": "a cat"}, {"prompt": ""}]


def test_an_importable_function_is_a_source():
    rows = load_prompts(f"{__name__}:my_rows", "test")
    assert rows == my_rows("test") and rows[2].where == f"{__name__}:my_rows, row 3"
    assert load_prompts(f"{__name__}:my_rows", "train", 5) == my_rows("train", 5)
    for name, message in (
        ("no_rows", "test_prompts:no_rows makes no train prompts"),
        ("bad_rows", "test_prompts:bad_rows, row 2: a row is an object with a non-empty string under `prompt`"),
        (
            "absent",
            "'test_prompts:absent' cannot be imported .*; use an importable 'module:function'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load_prompts(f"{__name__}:{name}", "train")
    with pytest.raises(ValueError, match="'absent:rows' cannot be imported .No module named 'absent'."):
        load_prompts("absent:rows", "train")


def test_a_source_in_the_package_is_found_by_its_name_alone(tmp_path, monkeypatch):
    "A new module in vgpo.prompts is all that a new source takes."
    import vgpo.prompts

    source = (
        'from vgpo.prompts.files import prompt_source\n@prompt_source("mine")\ndef f(split, count=None):\n    return '
    )
    (tmp_path / "mine.py").write_text(source + '[{"prompt": split}]\n')
    monkeypatch.setattr("vgpo.prompts.files.SOURCES", prompt_sources())
    monkeypatch.setattr(vgpo.prompts, "__path__", [*vgpo.prompts.__path__, str(tmp_path)])
    with pytest.raises(FileNotFoundError):
        load_prompts("yours", "test")
    assert load_prompts("mine", "test") == [{"prompt": "test"}]
    del sys.modules["vgpo.prompts.mine"]


def test_the_default_prompts_are_a_source():
    assert {PromptsConfig().train, PromptsConfig().test} <= set(prompt_sources())


def test_text_files(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes('\ufeffa cat\r\n\n  ein Bär \nfirst\u2028second\ra dog\n\ufeffa cat\n{a|b} "x'.encode())
    rows = load_prompts(str(file), "train")
    assert [row["prompt"] for row in rows] == ["a cat", "ein Bär", "first\u2028second", "a dog", "a cat", '{a|b} "x']
    assert [row.where for row in rows] == [f"{file}, line {n}" for n in (1, 3, 4, 5, 6, 7)]
    assert load_prompts(str(file), "test", count=2) == [{"prompt": "a cat"}, {"prompt": "ein Bär"}]
    assert load_prompts(str(file), "test", unique=True) == rows[:4] + rows[5:]
    long = "word " * (MAX_CHARACTERS // 5)
    file.write_text(long + "\n" + long)
    assert [len(row["prompt"]) for row in load_prompts(str(file), "train")] == [MAX_CHARACTERS - 1] * 2


def test_a_row_is_its_values_alone():
    "The address goes to nobody: not into JSON, not to an equal, and it survives a trip between processes."
    row = load_row('{"prompt": "a cat", "n": 1}')
    assert row == {"prompt": "a cat", "n": 1} and list(row) == ["prompt", "n"]
    assert json.loads(json.dumps(row)) == dict(row)
    assert copy.deepcopy(row).where == pickle.loads(pickle.dumps(row)).where == "here, line 1"


def load_row(line):
    from vgpo.prompts.files import parse_row

    return parse_row(line, True, "here, line 1")


def test_of_equal_prompts_the_first_is_kept(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p, "n": n}) for n, p in enumerate("abacb")))
    assert [(row["prompt"], row["n"]) for row in load_prompts(file, "test", unique=True)] == [
        ("a", 0), ("b", 1), ("c", 3)]  # fmt: skip
    assert len(load_prompts(file, "test", count=2, unique=True)) == 2


def test_jsonl_files_keep_what_the_reward_needs(tmp_path):
    rows = [
        {"tag": "counting", "include": [{"class": "bench", "count": 2}], "prompt": "two benches"},
        {"prompt": "line\u2028separator", "negative_prompt": "blur", "mine": [1, {"a": None}]},
        {"prompt": "a cat", "tag": "of my own", "include": "anything"},
        {"prompt": " a dog ", "tag": "counting", "negative_prompt": None},
    ]
    file = tmp_path / "rows.JSONL"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert load_prompts(str(file), "train") == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b'{"prompt": "a cat"}\n\n{"prompt": }\n',
            r"bad.jsonl, line 3: not valid JSON \(Expecting value at column 12\)",
        ),
        (b'{"prompt": "a cat"}\n["a dog"]\n', "bad.jsonl, line 2: a row is an object with a non-empty string"),
        (b'{"text": "a cat"}\n', "bad.jsonl, line 1: a row is an object"),
        (b'{"prompt": 3}\n', "bad.jsonl, line 1: a row is an object"),
        (b'{"prompt": " "}\n', "bad.jsonl, line 1: a row is an object"),
        (b" \n\n", "bad.jsonl holds no prompt; write one per line"),
        (b'{"prompt": "a"}\n' * 2000 + b"b\xe4r\n", r"bad.jsonl, line 2001: not UTF-8 \(.*\); convert the file"),
        ('{"prompt": "a"}'.encode("utf-16"), r"bad.jsonl, line 1: not UTF-8 \(.*\); convert the file"),
        (b'{"prompt": "a\\u0000b"}\n', r"bad.jsonl, line 1: `prompt` holds '\\x00', which is not text"),
        (b'{"prompt": "a\\ud800b"}\n', r"bad.jsonl, line 1: `prompt` holds '\\ud800', which is not text"),
        (
            b'{"prompt": "' + b"x" * 10_001 + b'"}',
            "line 1: `prompt` has 10001 characters; write one prompt per line, of 10",
        ),
        (b'{"prompt": "a", "negative_prompt": 3}', "line 1: `negative_prompt` must be a string, not 3"),
        (b'{"prompt": "a", "n": ' + b"1" * 5000 + b"}", "bad.jsonl, line 1: not a row"),
        (b"[" * 100_000, "bad.jsonl, line 1: not"),
        (
            b'{"prompt": "a"}\n{"tag": "counting", "include": [{"class": "cat", "count": 0}], "prompt": "no cats"}',
            "bad.jsonl, line 2: GenEval row with prompt 'no cats': 'count' must be a whole number",
        ),
        (
            b'{"prompt": "x", "tag": "colors", "include": []}',
            "bad.jsonl, line 1: GenEval row with prompt 'x': 'include' must be a list of at least one clause",
        ),
        (
            b'{"tag": "position", "include": [{"class": "a", "count": 1, "position": ["near", 0]}], "prompt": "a cat"}',
            "bad.jsonl, line 1: GenEval row with prompt 'a cat': unknown relation 'near'",
        ),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_bytes(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_prompts(str(tmp_path / "bad.jsonl"), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a cat\nb\0ar\n", r"bad.txt, line 2: `prompt` holds '\\x00', which is not text; save the file as UTF-8 text"),
        ('\n{"prompt": "a cat"}\n', "bad.txt, line 2: a JSON object; name such a file .jsonl"),
        (
            "a cat " * 2000,
            "bad.txt, line 1: `prompt` has 11999 characters; write one prompt per line, of 10000 at m",
        ),
        ("\ufeff\n", "bad.txt holds no prompt; write one per line"),
    ],
)
def test_bad_text_files(tmp_path, text, message):
    (tmp_path / "bad.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(str(tmp_path / "bad.txt"), "train")


def test_rows_that_a_reward_cannot_score_name_file_and_line(tmp_path):
    (tmp_path / "ocr.txt").write_text("a mug that says \"TEA\"\n\na mug that says “TEA”\na mug that says 'TEA'")
    rows = load_prompts(tmp_path / "ocr.txt", "train")
    assert check_rows(rows, reward=object()) is rows  # a reward that declares nothing takes any row
    assert check_rows(rows[:2], OCRRows()) == rows[:2]
    with pytest.raises(ValueError, match="ocr.txt, line 4: no OCR target for prompt .*: give its row a 'target'"):
        check_rows(rows, OCRRows())
    with pytest.raises(ValueError, match="ocr.txt, line 1: GenEval row with prompt .* unknown tag None"):
        check_rows(rows, GenEvalRows())
    check_rows([{"prompt": "a mug", "target": "TEA"}], OCRRows())
    with pytest.raises(ValueError, match="^prompt row 2: no OCR target for prompt 'a mug'"):
        check_rows([{"prompt": "a mug", "target": "TEA"}, {"prompt": "a mug"}], OCRRows())


@pytest.mark.parametrize("source", prompt_sources())
def test_every_source_suits_its_reward(source):
    for split in ("train", "test"):
        rows = load_prompts(source, split, 300)
        assert len(check_rows(rows, GenEvalRows() if "include" in rows[0] else OCRRows())) == 300


def test_a_negative_prompt_that_nobody_reads_stops_a_run(tmp_path):
    rows = [{"prompt": "a cat", "negative_prompt": text} for text in ("", None, "dogs")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = load_prompts(tmp_path / "rows.jsonl", "train")
    assert loaded == rows and check_rows(loaded[:2], None) == rows[:2]
    with pytest.raises(ValueError, match="rows.jsonl, line 3: a `negative_prompt` would be ignored, .* take it out"):
        check_rows(loaded, None)


def test_bad_sources(tmp_path):
    known = "does not exist; give a file or one of " + ", ".join(prompt_sources())
    for source in ("tiny-scene", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=known):
            load_prompts(source, "train")
    with pytest.raises(ValueError, match="split is 'val'; it must be 'train' or 'test'"):
        load_prompts("tiny-scenes", "val")


@needs_files
def test_the_public_geneval_file():
    rows = load_prompts(f"{real}/geneval/test_metadata.jsonl", "test")
    assert len(check_rows(rows, GenEvalRows())) == 2212
    assert set(Counter(row["prompt"] for row in rows).values()) == {4}
    unique = load_prompts(f"{real}/geneval/test_metadata.jsonl", "test", unique=True)
    assert len(unique) == 553 and {row["tag"] for row in unique} == set(TAGS)
    assert [row.where.rpartition(" ")[2] for row in rows] == [str(n) for n in range(1, 2213)]


@needs_files
def test_the_public_ocr_file():
    rows = check_rows(load_prompts(f"{real}/ocr/test.txt", "test"), OCRRows())
    targets = [target_text(row["prompt"], row) for row in rows]
    assert len(rows) == len({row["prompt"] for row in rows}) == 1018 and rows[-1].where.endswith("line 1018")
    for row, target in zip(rows, targets, strict=True):
        assert row["prompt"].count('"') == 2 and row["prompt"].split('"')[1] == target
    assert (min(map(len, targets)), max(map(len, targets))) == (2, 29)
    assert sum(not target.isascii() for target in targets) == 10 and len(set(map(normalize, targets))) == 953


@needs_files
def test_the_public_drawbench_file():
    rows = check_rows(load_prompts(f"{real}/drawbench/test.txt", "test"), reward=None)
    assert len(rows) == 1000 and set(Counter(row["prompt"] for row in rows).values()) == {5}
    assert len(load_prompts(f"{real}/drawbench/test.txt", "test", unique=True)) == 200
    assert not any('"' in row["prompt"] for row in rows) and sum("'" in row["prompt"] for row in rows) == 130
    with pytest.raises(ValueError, match="drawbench/test.txt, line 1: no OCR target"):
        check_rows(rows, OCRRows())
