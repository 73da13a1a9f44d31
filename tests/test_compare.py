"Two evaluations of the same images: results that can be checked by hand, a paired difference, and what is refused."

import json
import math
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from vgpo.evaluate import main
from vgpo.evaluation.compare import change_plot, compare
from vgpo.evaluation.statistics import mean_over_tasks
from vgpo.prompts.files import load_prompts

NAMES = ["GenEvalShapes", "tiny_rewards:brightness"]


@pytest.fixture(scope="module")
def pair(tiny_folder, trained, tmp_path_factory):
    "Two evaluations of the same samples, of a base model and of its LoRA, by two rewards; and the command."
    folder = tmp_path_factory.mktemp("pair")
    rows = load_prompts("tiny-scenes", "test", unique=True)[:12]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows + rows))  # each twice, as in people's files
    words = [
        str(tiny_folder),
        "--prompts",
        str(prompts),
        "--images_per_prompt=3",
        "--num_inference_steps=3",
        "--rewards",
        *NAMES,
    ]
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


def test_results_are_those_of_the_lines(pair):
    folder, _ = pair
    found = read(folder / "tuned")
    assert found["images"] == 36 and found["prompts"] == 12 and found["settings"]["rows"] == 12
    assert len(list((folder / "tuned" / "images").glob("*.png"))) == 36
    assert list(found["metrics"]) == NAMES and found["metrics"]["GenEvalShapes"]["version"].startswith(
        "GenEval's rules"
    )
    assert found["libraries"]["torch"] and re.fullmatch("[0-9a-f]{12}", found["settings"]["trained"])
    scored = lines(folder / "tuned", "GenEvalShapes")
    rows = [json.loads(line) for line in (folder / "tuned" / "prompts.jsonl").read_text().splitlines()]
    assert sorted(scored) == [(i, k) for i in range(12) for k in range(3)]
    for key in ("raw", "scaled", "strict"):
        values, tags = [line[key] for line in scored.values()], [rows[i]["tag"] for i, _ in scored]
        mean, error, tasks = mean_over_tasks(values, tags, 0.25, [i for i, _ in scored])
        part = found["metrics"]["GenEvalShapes"][key]
        assert part["mean"] == pytest.approx(mean) and len(part["by_task"]) == 6
        assert part["stderr"] == (pytest.approx(error) if math.isfinite(error) and key != "raw" else part["stderr"])
        assert part["by_task"]["colors"]["mean"] == pytest.approx(tasks["colors"][0])
    assert "strict" not in found["metrics"][NAMES[1]]
    assert "mean over tasks" in (folder / "tuned" / "table.md").read_text()


def test_comparison_is_paired_by_sample(pair):
    folder, _ = pair
    change = compare(folder / "base", folder / "tuned")
    before, after = (lines(folder / name, "tiny_rewards-brightness") for name in ("base", "tuned"))
    rows = [json.loads(line) for line in (folder / "base" / "prompts.jsonl").read_text().splitlines()]
    d = np.array([after[s]["scaled"] - before[s]["scaled"] for s in sorted(before)]).reshape(12, 3).mean(1)
    by_tag = {tag: d[[row["tag"] == tag for row in rows]] for tag in {row["tag"] for row in rows}}
    found = change[NAMES[1]]["scaled"]
    assert found["mean"] == pytest.approx(np.mean([part.mean() for part in by_tag.values()]))
    assert np.abs(d).max() > 1e-4
    for tag, part in by_tag.items():
        error = math.sqrt(part.var(ddof=1) / len(part)) if len(part) > 1 else 1.0
        assert found["by_task"][tag]["stderr"] == pytest.approx(error)
    same = compare(folder / "base", folder / "base")
    assert all(quantity["mean"] == 0 for name in NAMES for quantity in same[name].values())


def test_the_program_prints_the_difference_and_draws_it(pair, tmp_path, capsys):
    folder, _ = pair
    for words, place in (([], folder), (["--output", str(tmp_path / "new")], tmp_path / "new")):
        main(["--compare", str(folder / "base"), str(folder / "tuned"), *words])
        out, figure = capsys.readouterr().out, place / "change-base-tuned.png"
        assert "image by image" in out and f"figure: {figure}" in out and "+0." in out
        with Image.open(figure) as image:
            assert image.width > 600
    assert not list((folder / "base").glob("*change*"))


def test_what_cannot_be_compared_is_said(pair, tmp_path):
    folder, words = pair
    changed = read(folder / "tuned")
    shutil.copytree(folder / "tuned", tmp_path / "other")
    for keys, value, message in (
        (("settings", "seed"), 7, "seed is 0 in .*base and 7 in .*other"),
        (("settings", "rows_sha256"), "x", "rows_sha256 is"),
        (("settings", "images_per_prompt"), 4, "images_per_prompt is 3 in"),
        (("settings", "cluster"), "image", "cluster is prompt in"),
        (("metrics", "GenEvalShapes", "version"), "2", "version is GenEval.* and 2 in"),
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
    (tmp_path / "other" / "results.json").write_text("{")
    with pytest.raises(ValueError, match="results.json is damaged"):
        compare(folder / "base", tmp_path / "other")
    (tmp_path / "other" / "results.json").unlink()
    with pytest.raises(SystemExit, match="^error: .*other is not a finished evaluation"):
        main(["--compare", str(folder / "base"), str(tmp_path / "other")])


def test_the_same_command_again_and_another_reward(pair):
    folder, words = pair
    stored = (folder / "base" / "results.json").read_text()
    times = {path: path.stat().st_mtime_ns for path in (folder / "base").rglob("*.png")}
    main([*words, "--output", str(folder / "base")])
    assert (folder / "base" / "results.json").read_text() == stored
    main([*words[:-2], "JPEG", "--output", str(folder / "base")])
    assert list(read(folder / "base")["metrics"]) == ["JPEG"]
    assert {path: path.stat().st_mtime_ns for path in (folder / "base").rglob("*.png")} == times
    with pytest.raises(SystemExit, match="other settings: num_inference_steps is 3 there and 4 here"):
        main([*words, "--num_inference_steps=4", "--output", str(folder / "base")])
    main([*words, "--output", str(folder / "base")])
    assert (folder / "base" / "results.json").read_text() == stored


def test_a_reward_that_fails_says_how_to_go_on(tiny_folder, tmp_path, monkeypatch):
    words = [str(tiny_folder), "--num_samples=4", "--num_inference_steps=2", "--reward", "tiny_rewards:broken",
             "--output", str(tmp_path / "x")]  # fmt: skip
    with pytest.raises(
        SystemExit, match="^error: reward .*the reward is out; what is done stays in .*same command again"
    ):
        main(words)
    assert len(list((tmp_path / "x" / "images").glob("*.png"))) == 4
    monkeypatch.setattr("vgpo.evaluate.evaluate_in_folder", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit, match="^stopped; what is done stays in"):
        main(words)


@pytest.mark.parametrize(("words", "message"), [
    ([], "nothing to evaluate; give a run or a model"),
    (["tiny", "--num_samples=10", "--images_per_prompt=4"],
     "--num_samples is 10; it must be a multiple of --images_per_prompt"),
    (["tiny", "--images_per_prompt=0"], "--images_per_prompt is 0"),
    (["tiny", "--batch_size=0"], "--batch_size is 0"),
    (["tiny", "--guidance_scale=0.5"], "--guidance_scale is 0.5"),
    (["tiny", "--output=x.json"], "--output x.json must be a folder"),
    (["tiny", "--lora=absent"], "absent is neither a .safetensors file nor a folder with one"),
    (["tiny", "--reward=JPEG", '--reward_options={"OCR": {}}'], "--reward_options has OCR, which --rewards has not"),
    (["tiny", "--reward=JPEG", '--reward_options={"JPEG": {"x": 1}}'], "reward JPEG has no option 'x'"),
    (["tiny", "--reward=JPEG", '--reward_options={"JPEG": {"quality": 0}}'], "JPEG.quality is 0"),
    (["tiny", "--reward=absent_module:function"], "reward 'absent_module:function' cannot be imported"),
    (["tiny", "--reward=OCR", "--num_samples=6"], "tiny-scenes, row 1: no OCR target"),
])  # fmt: skip
def test_wrong_requests_end_in_one_line(words, message):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert str(stop.value).startswith(f"error: {message}") and "\n" not in str(stop.value)


def figures(mean, half, tasks=()):
    one = {"mean": mean, "stderr": half and half / 2, "ci95": half and [mean - half, mean + half]}
    return one | {"by_task": {task: one | {"images": 3} for task in tasks or ["all"]}}


def test_the_figure_shows_each_interval_and_takes_names_as_text():
    odd = [r"$$ \frac{1}{0}", "100%_^", "back\\slash"]
    change = {odd[0]: {"raw": figures(9.0, 1), "strict": figures(0.25, 0.125, odd)},
              "plain": {"raw": figures(-2.0, None), "scaled": figures(0, 1)}}  # fmt: skip
    figure = change_plot(change, odd[2])
    figure.draw_without_rendering()
    first, second = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == [*odd, "mean over tasks"]
    assert first.get_title() == f"{odd[0]}: change of strict" and figure._suptitle.get_text() == odd[2]
    intervals, dots = first.lines[:-1:2], first.lines[1:-1:2]
    assert all(list(line.get_xdata()) == [0.125, 0.375] for line in intervals) and len(intervals) == 4
    assert all(line.get_xdata()[0] == 0.25 for line in dots)
    assert second.get_title() == "plain: change of raw" and [t.get_text() for t in second.get_yticklabels()] == ["all"]
    assert list(second.lines[0].get_xdata()) == [-2.0, -2.0]  # no error, no interval
