import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vgpo.prompts.__main__ import main
from vgpo.prompts.files import load_prompts, prompt_sources
from vgpo.prompts.geneval import (
    FINGERPRINT,
    MIX,
    canonical_key,
    fingerprint,
    geneval_row,
    geneval_set,
    geneval_test,
    geneval_train,
    plural,
    round_robin,
    with_article,
)
from vgpo.prompts.ocr import held_out, ocr_rows
from vgpo.rewards.geneval import check_row
from vgpo.rewards.ocr import normalize, target_text

real = os.environ.get("VGPO_PROMPTS")
needs_files = pytest.mark.skipif(not real, reason="VGPO_PROMPTS does not name the folder of the public prompt files")


def thing(name, **more):
    return {"class": name, "count": 1} | more


FIRST_GENEVAL = [  # runs of the past stay repeatable only if these never change
    "a photo of a green truck and a yellow teddy bear",
    "a photo of a stop sign left of a toaster",
    "a photo of a motorcycle left of a handbag",
]
FIRST_OCR = [
    'A watercolor painting of a stone arch with the inscription "Lounge Tonight" in elegant script, on a foggy '
    "morning.",
    'A wide shot of a shop window displaying "Warning Low Bridge" in stitched thread, in a quiet room.',
]
GOLDEN = [  # from GenEval's test set, by hand
    ("single_object", [thing("airplane")], "a photo of an airplane"),
    ("two_object", [thing("person"), thing("apple")], "a photo of a person and an apple"),
    ("counting", [thing("bus", count=4)], "a photo of four buses"),
    ("counting", [thing("person", count=3)], "a photo of three persons"),
    ("counting", [thing("wine glass", count=2)], "a photo of two wine glasses"),
    ("colors", [thing("orange", color="orange")], "a photo of an orange orange"),
    ("position", [thing("elephant"), thing("hair drier", position=["below", 0])],
     "a photo of a hair drier below an elephant"),
    ("color_attr", [thing("orange", color="red"), thing("broccoli", color="purple")],
     "a photo of a red orange and a purple broccoli"),
]  # fmt: skip


@pytest.mark.parametrize(("tag", "include", "prompt"), GOLDEN)
def test_the_wording_is_genevals(tag, include, prompt):
    row = geneval_row(tag, include)
    check_row(row)
    assert row["prompt"] == prompt and prompt in {r["prompt"] for r in geneval_test()}
    assert row.get("exclude") == ([include[0] | {"count": include[0]["count"] + 1}] if tag == "counting" else None)


def test_articles_and_plurals_go_by_letters_alone():
    assert [with_article(word) for word in ("umbrella", "hair drier", "orange cow")] == [
        "an umbrella", "a hair drier", "an orange cow"]  # fmt: skip
    assert [plural(word) for word in ("skis", "sheep", "toothbrush")] == ["skises", "sheeps", "toothbrushs"]


def test_genevals_own_test_set_is_made_again():
    rows = geneval_test()
    tags = Counter(row["tag"] for row in rows)
    assert list(tags) == ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    assert list(tags.values()) == [80, 99, 80, 94, 100, 100]
    assert [row["prompt"] for row in rows[:3]] == ["a photo of a bench", "a photo of a cow", "a photo of a bicycle"]
    assert fingerprint(rows) == fingerprint(rows[::-1] + rows[:5]) == FINGERPRINT
    assert fingerprint(rows[1:]) != FINGERPRINT and fingerprint(geneval_set(44)) != FINGERPRINT


def test_other_random_numbers_are_not_called_genevals(monkeypatch):
    default_rng = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: default_rng([1, 2, 3]))
    with pytest.raises(
        RuntimeError, match="does not draw the numbers that GenEval's test set was made with; use an old"
    ):
        geneval_test()


def same_question(row):
    "All texts that ask for what a row asks for, written without `canonical_key`."
    first, *rest = row["include"]
    if row["tag"] == "position":
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        mirrored = [dict(rest[0]), dict(first)]
        mirrored[1]["position"] = [opposite[mirrored[0].pop("position")[0]], 0]
        return {row["prompt"], geneval_row("position", mirrored)["prompt"]}
    return {row["prompt"], geneval_row(row["tag"], [*rest, first])["prompt"]}


def test_no_training_prompt_asks_a_question_of_the_test_set():
    asked = {text for row in geneval_test() for text in same_question(row)}
    rows = geneval_train(20_000)
    assert not {row["prompt"] for row in rows} & asked
    for row in rows[:500]:
        check_row(row)
    assert len({row["prompt"] for row in rows if row["tag"] == "counting"}) == 160  # of 240, all that are left


def test_keys_are_equal_exactly_where_the_question_is():
    rows = geneval_set(5) + geneval_set(6)
    found = {row["prompt"]: canonical_key(row) for row in rows}
    for row in rows[::2]:
        texts = same_question(row)
        assert all((other == found[row["prompt"]]) == (prompt in texts) for prompt, other in found.items())
    with pytest.raises(ValueError, match="GenEval row with prompt 'x': unknown tag None"):
        canonical_key({"prompt": "x", "include": []})


def test_training_prompts_follow_flow_grpos_mix():
    tags, n = Counter(row["tag"] for row in geneval_train(8500, seed=3)), 8500
    assert MIX == {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1, "single_object": 0}
    for tag, weight in MIX.items():
        p = weight / 17
        assert abs(tags[tag] - n * p) <= 4 * (n * p * (1 - p)) ** 0.5
    assert {row["tag"] for row in geneval_train(50, mix={"colors": 2.5})} == {"colors"}


def test_training_prompts_depend_on_their_seed_alone():
    rows = geneval_train(300)
    assert geneval_train(40) == rows[:40] != geneval_train(40, seed=1)
    assert [row["prompt"] for row in rows[:3]] == FIRST_GENEVAL
    assert [row["prompt"] for row in ocr_rows("train", 2)] == FIRST_OCR


def test_own_questions_are_excluded_in_any_order():
    asked = geneval_train(200, seed=1)
    texts = {text for row in asked for text in same_question(row)}
    assert texts & {row["prompt"] for row in geneval_train(3000)}  # else the next line says nothing
    assert not texts & {row["prompt"] for row in geneval_train(3000, exclude=asked)}
    plain = [{"prompt": row["prompt"]} for row in geneval_train(200)]  # without clauses, texts are compared
    assert not {r["prompt"] for r in plain} & {r["prompt"] for r in geneval_train(200, exclude=plain)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": {"single_object": 1}}, "no single_object prompt is left outside the excluded ones; give that task"),
        ({"mix": {"countng": 1}}, r"the mix \{'countng': 1\} must give tasks weights >= 0, not all 0; tasks are sin"),
        ({"mix": {"colors": 0}}, "weights >= 0, not all 0"),
        ({"mix": {"colors": -1, "counting": 2}}, "weights >= 0, not all 0"),
        ({"mix": {"colors": float("nan")}}, "weights >= 0, not all 0"),
        ({"seed": -1}, "the seed is -1; it must not be negative"),
    ],
)
def test_what_cannot_be_made(options, message):
    with pytest.raises(ValueError, match=message):
        geneval_train(3, **options)


def test_the_test_set_as_a_source_takes_the_tasks_in_turn():
    rows = load_prompts("geneval", "test")
    assert len(rows) == 553 and fingerprint(rows) == FINGERPRINT
    assert set(Counter(row["tag"] for row in load_prompts("geneval", "test", 60)).values()) == {10}
    assert load_prompts("geneval", "test", 2212) == rows * 4
    assert load_prompts("geneval", "train", 20) == geneval_train(20)


def test_ocr_prompts_have_one_text_and_their_splits_none_in_common():
    train, test = ocr_rows("train", 8000), ocr_rows("test", 500, seed=4)
    targets = [[normalize(row["target"]) for row in rows] for rows in (train, test)]
    assert not set(targets[0]) & set(targets[1]) and all(map(held_out, targets[1]))
    for rows, found in zip((train, test), targets, strict=True):
        assert len(set(found)) == len(rows)
        for row in rows:
            assert 2 <= len(row["target"]) <= 29 and row["prompt"].isascii() and "#" not in row["prompt"]
            assert row["prompt"].split('"')[1::2] == [row["target"]] == [target_text(row["prompt"], {})]
    words = Counter(len(row["target"].split()) for row in train)
    assert words.most_common(1)[0][0] == 3 and sum(words[n] for n in (2, 3, 4)) > 0.9 * len(train)
    assert ocr_rows("test", 20, seed=4) == test[:20] != ocr_rows("test", 20)


def test_ocr_targets_are_excluded_as_the_reward_compares_them():
    asked = [
        {"prompt": f"a sign that says “{row['target'].upper().replace(' ', '  ')}”"} for row in ocr_rows("train", 50)
    ]
    excluded = {normalize(target_text(row["prompt"], {})) for row in asked}
    rows = ocr_rows("train", 200, exclude=asked)
    assert len(excluded) == 50 and not excluded & {normalize(row["target"]) for row in rows}
    with pytest.raises(ValueError, match="no OCR target for prompt 'a cat'"):
        ocr_rows("train", 1, exclude=[{"prompt": "a cat"}])


def test_ocr_texts_can_run_out(monkeypatch):
    monkeypatch.setattr("vgpo.prompts.ocr.random_target", lambda rng: "ONE")
    with pytest.raises(
        ValueError, match="no train text is left outside the 1 that are taken; ask for fewer OCR prompts"
    ):
        ocr_rows("train", 2)


def test_files_are_written_and_read_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main("geneval --split test --out evaluation_metadata.jsonl".split())
    assert load_prompts("evaluation_metadata.jsonl", "test") == round_robin(geneval_test())
    Path("own.txt").write_text("\n".join(row["prompt"] for row in geneval_train(30)))
    Path("more.jsonl").write_text(json.dumps(geneval_train(31)[-1]))
    main("geneval --count 400 --exclude own.txt more.jsonl --out new.jsonl".split())
    rows = load_prompts("new.jsonl", "train")
    assert len(rows) == 400 and not {r["prompt"] for r in rows} & {r["prompt"] for r in geneval_train(31)}
    main("ocr --split test --count 30 --seed 2 --out signs.txt".split())
    main("ocr --split test --count 30 --seed 2 --out signs.jsonl".split())
    assert load_prompts("signs.jsonl", "test") == ocr_rows("test", 30, seed=2)
    assert [r["prompt"] for r in load_prompts("signs.txt", "test")] == [r["prompt"] for r in ocr_rows("test", 30, 2)]
    assert "signs.txt: 30 rows, 30 different prompts" in capsys.readouterr().out


def test_any_source_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in prompt_sources():
        main([source, "--split", "test", "--count", "40", "--out", f"{source}.jsonl"])
        assert load_prompts(f"{source}.jsonl", "test") == load_prompts(source, "test", 40)


def test_the_program_is_the_package(tmp_path):
    "As `python -m vgpo.prompts`: its sources are those that every other module sees."
    words = [sys.executable, "-m", "vgpo.prompts", "ocr", "--count", "3", "--out", str(tmp_path / "three.txt")]
    assert "3 rows" in subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert len(load_prompts(tmp_path / "three.txt", "train")) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("geneval --out taken.jsonl", "error: taken.jsonl exists; move it away or choose another name"),
        (
            "geneval --count 99 --out rows.txt",
            "rows.txt; rows of geneval also hold exclude, include, tag; write a .jsonl file$",
        ),
        ("ocr --out rows.csv", "error: --out is rows.csv; write a .jsonl file or a .txt file$"),
        ("ocr --count 0 --out x.txt", "error: --count is 0; it must be at least 1"),
        ("geneval --split test --seed 1 --out x.jsonl", "test set is what it is; leave out --seed and --exclude"),
        ("tiny-words --seed 1 --out x.jsonl", "error: tiny-words has no --seed; leave it out"),
        ("tiny-word --out x.jsonl", "error: unknown source of prompts 'tiny-word': use one of geneval, ocr, tiny-"),
        ("geneval --exclude absent.jsonl --out x.jsonl", "error: prompt file absent.jsonl does not exist"),
        ("geneval --count 5 --out no/folder.jsonl", "error: --out is no/folder.jsonl; the folder no does not exist"),
    ],
)
def test_refused_requests_leave_no_file(tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    Path("taken.jsonl").write_text("kept")
    with pytest.raises(SystemExit, match=message):
        main(line.split())
    assert os.listdir() == ["taken.jsonl"] and Path("taken.jsonl").read_text() == "kept"


@needs_files
def test_every_public_geneval_row_is_said_in_our_words():
    public = load_prompts(f"{real}/geneval/test_metadata.jsonl", "test")
    assert all(geneval_row(row["tag"], row["include"]) == row for row in public)
    ours = {row["prompt"]: row for row in geneval_test()}
    assert len(public) == 2212 and {row["prompt"]: row for row in public} == ours
    assert geneval_train(500, exclude=public) == geneval_train(500)  # nothing that was not excluded already


@needs_files
def test_public_ocr_targets_can_be_kept_out(tmp_path):
    file, out = f"{real}/ocr/test.txt", tmp_path / "train.txt"
    main(["ocr", "--count", "5000", "--exclude", file, "--out", str(out)])
    public, ours = (
        {normalize(target_text(row["prompt"], row)) for row in load_prompts(path, "train")} for path in (file, out)
    )
    assert len(public) == 953 and len(ours) == 5000 and not public & ours
