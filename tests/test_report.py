"The page of a run: its figures, its images, its warnings first, and the file that programs read."

import json

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from vgpo.config import Config
from vgpo.evaluation.images import EvaluationConfig
from vgpo.evaluation.scores import Evaluation
from vgpo.policies.loading import ModelConfig
from vgpo.report import report_sheet, report_table, write_report
from vgpo.rewards.base import Scores

ROWS = [{"prompt": f"prompt {i}", "tag": ("colors", "counting")[i % 2]} for i in range(20)]
ODD = [{"prompt": text} for text in ("$$5", r"\frac{1}{0}", "100% %s", "a\\n_{", "$")]


def evaluation(right, rows=ROWS, verdict=True, validation=None, shown=None):
    "An Evaluation of grey images, of which the first `right` are right and score 1, the others 0."
    values = (torch.arange(len(rows)) < right).float()
    scores = {"reward": Scores(values, values.clone(), values > 0 if verdict else None)}
    if validation is not None:
        scores["validation"] = Scores(*[torch.full((len(rows),), validation)] * 2)
    shown = list(range(len(rows))) if shown is None else shown
    images = np.stack([np.full((4, 4, 3), i, dtype=np.uint8) for i in shown])
    return Evaluation(rows, scores, images, shown)


def test_table_has_a_row_per_task_and_the_errors_of_the_difference():
    "Of each task's ten rows two are right before, and the same and two more after."
    before, after = evaluation(4, validation=0.5), evaluation(8, validation=0.25)
    text = report_table(before, after)
    error = np.concatenate([[0] * 2, [1] * 2, [0] * 6]).var(ddof=1) / 10
    assert f"| accuracy | 0.200 | 0.400 | +0.200 ± {np.sqrt(2 * error) / 2:.3f} |" in text
    assert f"| accuracy, counting | 0.200 | 0.400 | +0.200 ± {np.sqrt(error):.3f} |" in text
    assert "| reward in [0, 1] | 0.200 | 0.400 |" in text
    assert "| validation: reward in [0, 1] | 0.500 | 0.250 | -0.250 ± 0 |" in text
    plain = report_table(evaluation(4, verdict=False), evaluation(8, verdict=False))
    assert "accuracy" not in plain and len(plain.splitlines()) == 3
    one = [{"prompt": str(i)} for i in range(20)]
    assert "accuracy, all" not in report_table(evaluation(4, one), evaluation(8, one))


def test_the_sheet_shows_what_both_kept_and_counts_all():
    before, after = evaluation(4, shown=[0, 3, 17]), evaluation(8)
    figure = report_sheet(before, after)
    title = figure._suptitle.get_text().replace("\n", " ")
    assert title.startswith("3 of 20 held-out prompts") and "right (green): 2 before, 2 after" in title
    assert "all 20 images: accuracy 0.200 before, 0.400 after (+0.200 ± 0.094)" in title
    assert [int(axis.images[0].get_array()[0, 0, 0]) for axis in figure.axes] == [0, 3, 17] * 2
    assert "mean reward 0.200 before" in report_sheet(*[evaluation(4, verdict=False)] * 2)._suptitle.get_text().replace(
        "\n", " "
    )


def write_trial(folder, verdict=True, lora_rank=8, rows=ROWS, name="trial", **more):
    "A report of twenty grey images, before and after; returns its text and its results."
    before, after = evaluation(4, rows, verdict), evaluation(8, rows, verdict)
    config = Config(
        name=name, seed=3, model=ModelConfig(lora_rank=lora_rank), evaluation=EvaluationConfig(num_samples=20)
    )
    write_report(folder, config, before, after, [{"epoch": 0, "reward": 0.5}], 12.34, **more)
    return (
        (folder / "report.md").read_text(encoding="utf-8"),
        json.loads((folder / "results.json").read_text()),
        before,
        after,
    )


@pytest.mark.parametrize("verdict", [True, False])
def test_report_names_its_images_and_its_numbers(tmp_path, verdict):
    text, results, before, after = write_trial(tmp_path, verdict)
    assert text.startswith("# trial, VGPO, seed 3\n\n1 epochs of ") and "| 0.200 | 0.400 | +0.200 ± 0.094 |" in text
    for name in ("before_after.png", "curves.png"):
        assert f"]({name})" in text and (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert results["seconds"] == 12.3 and results["warnings"] == [] and "arning" not in text
    assert (results["images"], results["epochs"]) == (20, 1)
    assert set(results) == {"before", "after", "change", "images", "seconds", "epochs", "warnings"}
    for key, found in (("before", before.summary), ("after", after.summary), ("change", after.change_from(before))):
        assert results[key] == json.loads(json.dumps(found)) and ("strict" in results[key]["reward"]) == verdict


@pytest.mark.parametrize("lora_rank, folder, other", [(8, "lora", "transformer"), (0, "transformer", "lora")])
def test_report_says_where_the_weights_are(tmp_path, lora_rank, folder, other):
    text = write_trial(tmp_path, lora_rank=lora_rank)[0]
    assert f"in `{folder}/`" in text and f"`{other}/`" not in text


def test_report_begins_with_its_warnings(tmp_path):
    text, results, *_ = write_trial(tmp_path, warnings=["validation fell", "no spread"])
    assert text.startswith(
        "# trial, VGPO, seed 3\n\n## Warnings\n\n- validation fell\n- no spread\n\n## Results\n\n1 ep"
    )
    assert results["warnings"] == ["validation fell", "no spread"]


def test_odd_prompts_and_names_are_text(tmp_path):
    text = write_trial(tmp_path, rows=ODD, name="a _ {0} 100%s", warnings=["{x} $$ %d"])[0]
    assert text.startswith("# a \\_ {0} 100%s, VGPO") and "- {x} $$ %d\n" in text
    assert (tmp_path / "before_after.png").read_bytes().startswith(b"\x89PNG")


def test_the_sheet_shows_24_of_many_images():
    rows = [{"prompt": f"prompt {i}", "tag": f"task {i % 6}"} for i in range(60)]
    figure = report_sheet(evaluation(4, rows, True), evaluation(8, rows, True))
    assert any(text.get_text().startswith("24 of 60 held-out prompts") for text in figure.findobj(Text))
