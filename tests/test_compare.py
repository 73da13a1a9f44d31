import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from vgpo.evaluate import mean_over_tasks
from vgpo.evaluation.scores import Exam
from vgpo.prompts.files import load_prompts
from vgpo.evaluation.compare import cell, check_request, compare, exam_rows, groups, interval, main, metric, table

SCENES = ["geneval-shapes", "tiny_rewards:brightness"]


@pytest.fixture(scope="module")
def pair(tiny_folder, trained, tmp_path_factory):
    "Two evaluations of the same items, of a base model and of its LoRA, by two judges; and the file of prompts."
    folder = tmp_path_factory.mktemp("pair")
    rows = load_prompts("tiny-scenes", "test", unique=True)[:12]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows + rows))  # each twice, as in people's files
    words = [str(tiny_folder), "--prompts", str(prompts), "--images_per_prompt=3", "--steps=3", "--rewards", *SCENES]
    main([*words, "--output", str(folder / "base")])
    main([*words, "--lora", str(trained[0] / "lora"), "--output", str(folder / "tuned")])
    return folder, words


def read(folder):
    return json.loads((folder / "results.json").read_text())


def lines(folder, name):
    "{(prompt, sample): line} of the scores of a reward in a folder, read by other means than the module's."
    files = (folder / "scores" / name).glob("*.jsonl")
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {(line["prompt"], line["sample"]): line for line in found}


def test_geneval_is_a_mean_over_six_tags_with_errors_by_prompt():
    "Six tags of 2 to 7 prompts, four images each: figures by hand from the means of prompts."
    rng = np.random.default_rng(0)
    sizes = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 6, "f": 7}
    rows = [{"prompt": f"{tag}{i}", "tag": tag} for tag, n in sizes.items() for i in range(n)]
    verdicts = rng.random((len(rows), 4)) < rng.random((len(rows), 1))
    tags, clusters = groups(Exam(None, rows, 4), "prompt")
    found = metric({"strict": verdicts.reshape(-1).tolist()}, tags, clusters)["strict"]
    parts = {tag: verdicts[[row["tag"] == tag for row in rows]].mean(1) for tag in sizes}
    assert found["mean"] == pytest.approx(np.mean([part.mean() for part in parts.values()]))
    variance = sum(part.var(ddof=1) / len(part) for part in parts.values()) / 36
    assert found["stderr"] == pytest.approx(math.sqrt(variance))
    assert found["ci95"] == pytest.approx([found["mean"] - 1.96 * variance**0.5, found["mean"] + 1.96 * variance**0.5])
    assert found["by_task"]["c"]["images"] == 16 and found["mean"] != pytest.approx(verdicts.mean(), abs=1e-3)


def test_interval_respects_bounds_and_unknown_errors():
    found = metric({"raw": [22.0, 24.0], "scaled": [0.9, 1.0], "strict": [True, True]}, ["x", "x"], [0, 0])
    assert found["raw"]["stderr"] is None and found["raw"]["ci95"] is None
    assert found["scaled"]["stderr"] == 0.5 and found["scaled"]["ci95"] == [0, 1]
    change = metric({"strict": [1.0]}, ["x"], [0], {"strict": (-1, 1)})["strict"]
    assert change["stderr"] == 1 and change["ci95"] == [pytest.approx(-0.96), 1]
    json.dumps(found, allow_nan=False)


def test_clusters_are_prompts_by_text():
    rows = [{"prompt": text} for text in ("x", "y", "x")]
    assert groups(Exam(None, rows, 2), "prompt") == (["all"] * 6, [0, 0, 1, 1, 0, 0])
    assert groups(Exam(None, rows, 2), "image")[1] is None


def test_rows_of_an_exam(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a\nb\na\nc\n")
    assert [row["prompt"] for row in exam_rows(str(file), 100, 1)] == ["a", "b", "a", "c"]
    assert [row["prompt"] for row in exam_rows(str(file), 8, 4)] == ["a", "b"]
    assert [row["prompt"] for row in exam_rows(str(file), 2000, 4)] == ["a", "b", "c"]
    official = exam_rows("geneval", 2212, 4)
    assert len(official) == 553 and len({row["tag"] for row in official}) == 6
    assert exam_rows("tiny-scenes", 528, 1) == load_prompts("tiny-scenes", "test", 528)


def test_what_is_printed():
    assert (
        cell(None) == "–"
        and cell({"mean": 0.5, "stderr": None}) == "0.500"
        and cell({"mean": 1, "stderr": 0}) == "1.000 ± 0"
    )
    small = {"mean": -0.0021, "stderr": 0.00023, "ci95": [-0.00255, -0.00165]}
    assert cell(small) == "-0.00210 ± 0.00023" and interval(small, "+") == "-0.00255 to -0.00165"
    text = table({"m": metric({"raw": [1, 2, 3, 4], "strict": [1, 0, 0, 0]}, list("aabb"))}, "+").splitlines()
    assert [line.split(" | ")[1].strip() for line in text[2:]] == ["a", "b", "mean over tasks"]
    assert (
        text[4].startswith("| m      | mean over tasks | +2.500 ± 0.354 | +0.250 ± 0.250 |")
        and len(set(map(len, text))) == 1
    )
    assert "| all " in table({"m": metric({"raw": [1, 2]}, ["all", "all"])})


def test_results_are_those_of_the_lines(pair):
    folder, _ = pair
    found = read(folder / "tuned")
    assert found["images"] == 36 and found["prompts"] == 12 and found["settings"]["rows"] == 12
    assert len(list((folder / "tuned" / "images").glob("*.png"))) == 36
    assert list(found["metrics"]) == SCENES and found["metrics"]["geneval-shapes"]["version"].startswith(
        "GenEval's rules"
    )
    assert found["libraries"]["torch"] and found["settings"]["trained"].startswith("lora sha256 ")
    scored = lines(folder / "tuned", "geneval-shapes")
    rows = [json.loads(line) for line in (folder / "tuned" / "prompts.jsonl").read_text().splitlines()]
    assert sorted(scored) == [(i, k) for i in range(12) for k in range(3)]
    for key in ("raw", "scaled", "strict"):
        values, tags = [line[key] for line in scored.values()], [rows[i]["tag"] for i, _ in scored]
        mean, error, tasks = mean_over_tasks(values, tags, 0.25, [i for i, _ in scored])
        part = found["metrics"]["geneval-shapes"][key]
        assert part["mean"] == pytest.approx(mean) and len(part["by_task"]) == 6
        assert part["stderr"] == (pytest.approx(error) if math.isfinite(error) and key != "raw" else part["stderr"])
        assert part["by_task"]["colors"]["mean"] == pytest.approx(tasks["colors"][0])
    assert "strict" not in found["metrics"][SCENES[1]]
    assert "mean over tasks" in (folder / "tuned" / "table.md").read_text()


def test_comparison_is_paired_by_item(pair):
    folder, _ = pair
    change = compare(folder / "base", folder / "tuned")
    before, after = (lines(folder / name, "tiny_rewards-brightness") for name in ("base", "tuned"))
    rows = [json.loads(line) for line in (folder / "base" / "prompts.jsonl").read_text().splitlines()]
    d = np.array([after[item]["scaled"] - before[item]["scaled"] for item in sorted(before)]).reshape(12, 3).mean(1)
    by_tag = {tag: d[[row["tag"] == tag for row in rows]] for tag in {row["tag"] for row in rows}}
    found = change[SCENES[1]]["scaled"]
    assert found["mean"] == pytest.approx(np.mean([part.mean() for part in by_tag.values()]))
    assert np.abs(d).max() > 1e-4
    for tag, part in by_tag.items():
        error = math.sqrt(part.var(ddof=1) / len(part)) if len(part) > 1 else 1.0
        assert found["by_task"][tag]["stderr"] == pytest.approx(error)
    same = compare(folder / "base", folder / "base")
    assert all(quantity["mean"] == 0 for name in SCENES for quantity in same[name].values())


def test_what_cannot_be_compared_is_said(pair, tmp_path, capsys):
    folder, words = pair
    main(["--compare", str(folder / "base"), str(folder / "tuned")])
    assert "image by image" in capsys.readouterr().out
    changed = read(folder / "tuned")
    shutil.copytree(folder / "tuned", tmp_path / "other")
    for keys, value, message in (
        (("settings", "seed"), 7, "seed is 0 in .*base and 7 in .*other"),
        (("settings", "rows_sha256"), "x", "rows_sha256 is"),
        (("metrics", "geneval-shapes", "version"), "2", "version is GenEval.* and 2 in"),
        (("metrics",), {}, "no reward in common"),
    ):
        content = json.loads(json.dumps(changed))
        part = content
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        (tmp_path / "other" / "results.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"cannot be compared: .*{message}"):
            compare(folder / "base", tmp_path / "other")
    (tmp_path / "other" / "results.json").unlink()
    with pytest.raises(SystemExit, match="^error: .*other is not a finished evaluation"):
        main(["--compare", str(folder / "base"), str(tmp_path / "other")])


def test_the_same_command_again_and_another_judge(pair, capsys):
    folder, words = pair
    stored = (folder / "base" / "results.json").read_text()
    times = {path: path.stat().st_mtime_ns for path in (folder / "base").rglob("*.png")}
    main([*words, "--output", str(folder / "base")])
    assert (folder / "base" / "results.json").read_text() == stored
    main([*words[:-2], "jpeg", "--output", str(folder / "base")])
    assert list(read(folder / "base")["metrics"]) == ["jpeg"]
    assert {path: path.stat().st_mtime_ns for path in (folder / "base").rglob("*.png")} == times
    with pytest.raises(SystemExit, match="other settings: steps is 3 there and 4 here"):
        main([*words, "--steps=4", "--output", str(folder / "base")])
    main([*words, "--output", str(folder / "base")])
    assert (folder / "base" / "results.json").read_text() == stored


def test_a_reward_that_fails_says_how_to_go_on(tiny_folder, tmp_path, monkeypatch):
    words = [
        str(tiny_folder),
        "--images=4",
        "--steps=2",
        "--reward",
        "tiny_rewards:broken",
        "--output",
        str(tmp_path / "x"),
    ]
    with pytest.raises(
        SystemExit, match="^error: reward .*the judge is out; what is done stays in .*same command again"
    ):
        main(words)
    assert len(list((tmp_path / "x" / "images").glob("*.png"))) == 4
    monkeypatch.setattr("vgpo.evaluation.compare.hold", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit, match="^stopped; what is done stays in"):
        main(words)


@pytest.mark.parametrize(("words", "message"), [
    ([], "nothing to evaluate; give a run or a model"),
    (["tiny", "--images=10", "--images_per_prompt=4"], "--images is 10; it must be a multiple of --images_per_prompt"),
    (["tiny", "--images_per_prompt=0"], "--images_per_prompt is 0"),
    (["tiny", "--batch_size=0"], "--batch_size is 0"),
    (["tiny", "--guidance_scale=0.5"], "--guidance_scale is 0.5"),
    (["tiny", "--output=x.json"], "--output x.json must be a folder"),
    (["tiny", "--lora=absent"], "--lora absent is no folder with a .safetensors file"),
    (["tiny", "--reward=jpeg", '--reward_options={"ocr": {}}'], "--reward_options has ocr, which --rewards has not"),
    (["tiny", "--reward=jpeg", '--reward_options={"jpeg": {"x": 1}}'], "reward 'jpeg' cannot be made"),
    (["tiny", "--reward=ocr", "--images=6"], "prompt row 1: no OCR target"),
])  # fmt: skip
def test_wrong_requests_end_in_one_line(words, message):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert str(stop.value).startswith(f"error: {message}") and "\n" not in str(stop.value)


def test_several_processes_need_a_folder():
    with pytest.raises(ValueError, match="2 processes need --output FOLDER"):
        check_request(None, SimpleNamespace(num_processes=2))
