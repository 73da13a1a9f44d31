"What a user wrote is shown as it was written, and a figure that cannot be drawn costs nothing but itself."

import io
import json
import re

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from PIL import Image

from vgpo.evaluation.compare import change_plot
from vgpo.evaluation.scores import Evaluation
from vgpo.evaluation.statistics import metrics_table, summarize
from vgpo.generate import save_images
from vgpo.plots import before_after, image_grid
from vgpo.report import report_table
from vgpo.rewards.base import Scores
from vgpo.text import figure_text, markdown, printable, save_figure
from vgpo.train import main

ODD = [
    "$$",
    "$x^$ and $_",
    "a price of $$5, $$6",
    r"\frac{1}{0} \\ \$",
    "100% %s {0} {x!r}",
    "a | b || c",
    "`code` ``",
    "*a* _b_ __c__ ~~d~~",
    "<b>&amp;</b> <!-- x",
    "[a](b) ![c](d) [^1]",
    "# a # b",
    "two\nlines\r\nthree",
    "a\tb",
    "\x1b[31mred\x07",
    "half \ud83d",
    "猫 🐈 \u202eabc",
    "a" * 300,
    "\n" * 400,
    "word " * 2000,
    "snake_case_ _x a__b",
    "https://a.b/c?d=$1&e",
    "-",
    "",
]


def images(n):
    return np.full((n, 4, 4, 3), 99, dtype=np.uint8)


def scores(n, verdict=True):
    values = (torch.arange(n) % 2).float()
    return Scores(values, values.clone(), values > 0 if verdict else None, [{}] * n)


def evaluation(tags):
    rows = [{"prompt": tag or "x", "tag": tag} for tag in tags for _ in range(2)]
    return Evaluation(rows, {"reward": scores(len(rows))}, images(len(rows)), list(range(len(rows))))


def rendered(text):
    "What a reader of Markdown sees: the cells of tables, and headings, as plain text."
    found, tokens = [], MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    for token in tokens:
        if token.type == "inline":
            assert all(child.type == "text" for child in token.children), token
            found.append("".join(child.content for child in token.children))
    return found


def one_line(text):
    return " ".join(printable(text).split())


# --- Markdown ---


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_markdown_shows_the_text(text):
    line = markdown(text)
    assert "\n" not in line
    assert rendered(f"| {line} | b |\n|---|---|\n| c | {line} |\n") == [one_line(text), "b", "c", one_line(text)]
    assert rendered(f"# x{line}") == [f"x{one_line(text)}"]
    assert len(re.findall(r"(?<!\\)\$+", line)) < 2  # nor is there a formula, for readers that know them


def test_plain_names_stay_as_they_are():
    for text in (
        "two_object",
        "color_attr",
        "my-run 2 (b)",
        "module:function",
        "tiny_rewards:brightness",
        "café, 50 %",
    ):
        assert markdown(text) == text


def test_tables_have_a_row_per_task_whatever_its_name():
    tags = [tag for tag in ODD if tag.strip()]
    before, after = evaluation(tags), evaluation(tags)
    cells = rendered(report_table(before, after))
    assert len(cells) % 4 == 0 and set(cells[0::4]) >= {f"accuracy, {one_line(tag)}" for tag in tags}
    name = "my|reward"
    cells = rendered(metrics_table({name: before.summary["reward"]}))
    assert len(cells) % 5 == 0 and set(cells[1::5]) >= {one_line(tag) for tag in tags} and cells[5] == name


# --- figures ---


def png(figure, path):
    assert save_figure(path, lambda: figure)
    with Image.open(path) as image:
        assert max(image.size) < 2**16
        return image.size


def test_every_figure_takes_every_text(tmp_path, capfd):
    n = len(ODD)
    png(image_grid(images(n), [f"{text}\n0.5" for text in ODD], title="".join(ODD)), tmp_path / "grid.png")
    for text in ODD:
        png(image_grid(images(1), title=text, row_labels=[text]), tmp_path / "title.png")
    sheet = before_after(images(n), images(n), ODD, scores=(scores(n), scores(n)), note=ODD[1], tags=ODD)
    png(sheet, tmp_path / "sheet.png")
    tasks = [text for text in ODD for _ in range(2)]
    figures = summarize({"raw": np.arange(2.0 * n)}, tasks, None, {"raw": (0, 2 * n)})
    png(change_plot({text: figures for text in ODD[:3]}, "".join(ODD)), tmp_path / "change.png")
    assert capfd.readouterr() == ("", "")  # and without a word, such as one for each letter that the font lacks


def test_a_task_called_like_the_mean_keeps_its_row():
    figures = summarize({"raw": np.arange(4.0)}, ["mean over tasks", "b"] * 2, None, {"raw": (0, 4)})
    axis = change_plot({"reward": figures}).axes[0]
    assert sorted(label.get_text() for label in axis.get_yticklabels()) == ["b", "mean over tasks", "mean over tasks"]


def test_a_long_text_keeps_its_beginning_and_its_end():
    lines = figure_text("word " * 5000 + "\n0.25", 20).split("\n")
    assert len(lines) == 24 and lines[0] == "word word word word" and lines[-2:] == ["…", "0.25"]
    assert figure_text("a\r\nb\x00", 20) == "a\nb\\x00"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x^\n^"),
        RuntimeError("In set_text"),
        TypeError(""),
        MemoryError(),
        OSError(28, "full"),
        KeyError("a"),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_a_line(tmp_path, capfd, error):
    path = tmp_path / "old.png"
    path.write_text("an older figure")

    def draw():
        raise error

    assert save_figure(path, draw) is False and not path.exists()
    assert re.fullmatch(r"warning: \S*/old.png was not drawn \(.+\)\n", capfd.readouterr().err)


def test_a_mistake_of_ours_is_no_figure_that_cannot_be_drawn(tmp_path):
    with pytest.raises(AttributeError):
        save_figure(tmp_path / "a.png", lambda: None)


def test_a_spare_figure_that_cannot_be_written_is_a_line(tmp_path, capfd):
    (tmp_path / "file").touch()
    small, path = lambda: Figure(figsize=(1, 1)), tmp_path / "file" / "a.png"
    assert save_figure(path, small, spare=True) is False
    assert "file/a.png was not drawn" in capfd.readouterr().err
    with pytest.raises(OSError, match="file"):  # of which a run says what to do
        save_figure(path, small)
    assert save_figure(tmp_path / "new" / "b.png", lambda: Figure(figsize=(0.1, 900)))
    assert png(Figure(figsize=(1, 1)), tmp_path / "c.png") == (110, 110)


# --- runs ---

SMALL = [
    *("--rollout.prompts_per_epoch=2", "--rollout.group_size=2", "--rollout.num_inference_steps=2", "--window.size=1"),
    *("--credit.num_scored_steps=2", "--rollout.micro_batch_size=4", "--evaluation.num_inference_steps=2"),
    *("--reward=tiny_rewards:brightness", "--log_images_every=1", "--optim.num_minibatches=1"),
    *("--epochs=1", "--optim.lr_scheduler=constant", "--name=[a] {0} | %s_"),
]  # fmt: skip


@pytest.fixture
def options(tiny_folder, tmp_path):
    "Options of a run of one epoch whose prompts, tasks and name are odd."
    texts = [text for text in ODD if text.strip() and text.isprintable()] + ["two\nlines", "\x1b[31mred"]
    rows = [{"prompt": text, "tag": text} for text in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    count = f"--evaluation.num_samples={len(rows)}"
    return [
        *SMALL, count, f"--model.path={tiny_folder}", f"--output_dir={tmp_path}",
        f"--prompts.train={tmp_path / 'rows.jsonl'}", f"--prompts.test={tmp_path / 'rows.jsonl'}"]  # fmt: skip


FIGURES = ("samples/epoch-0000.png", "before_after.png", "curves.png")


def test_a_run_on_odd_prompts_is_drawn_reported_and_resumed(options, tmp_path, capfd):
    main(options)
    run = tmp_path / "[a] {0} | %s_"
    assert all(Image.open(run / name).size for name in FIGURES)
    report = (run / "report.md").read_text()
    assert rendered(report.partition("\n")[0]) == ["[a] {0} | %s_, VGPO, seed 0"]
    assert f"--run '{run}' " in report and "not drawn" not in capfd.readouterr().err
    main(["--resume", str(run), "--epochs=2"])
    assert (run / "samples" / "epoch-0001.png").stat().st_size and json.loads((run / "results.json").read_text())[
        "epochs"
    ] == 2


def test_a_run_that_cannot_draw_loses_nothing_else(options, tmp_path, monkeypatch, capfd):
    def savefig(*arguments, **more):
        raise RuntimeError("the font is gone")

    monkeypatch.setattr(Figure, "savefig", savefig)
    main(options)
    run = tmp_path / "[a] {0} | %s_"
    assert (run / "report.md").is_file() and (run / "results.json").is_file() and (run / "lora").is_dir()
    said = [line for line in capfd.readouterr().err.split("\n") if "not drawn" in line]
    assert len(said) == 3 and all(str(run / name) in line for name, line in zip(FIGURES, said, strict=True))
    assert not any((run / name).exists() for name in FIGURES)


def test_samples_that_cannot_be_written_end_no_run(options, tmp_path, capfd):
    from vgpo.train import begin

    session = begin(options)
    (session.folder / "samples").touch()  # a file, where the folder would be
    session.run()
    assert "epoch-0000.png was not drawn" in capfd.readouterr().err and (session.folder / "report.md").is_file()


def test_images_of_odd_prompts_are_written_beside_their_grid(tmp_path, monkeypatch, capfd):
    prompts = [text for text in ODD if "\ud83d" not in text]
    paths = save_images(images(len(prompts)), prompts, 1, tmp_path, {"seed": 0})
    assert len({path for path in paths if path.is_file() and path.parent == tmp_path}) == len(prompts)
    with Image.open(paths[0]) as image:
        assert image.text["prompt"] == prompts[0]
    assert Image.open(tmp_path / "grid.png").size
    monkeypatch.setattr(Figure, "savefig", lambda *a, **k: io.BytesIO().read("no number"))  # TypeError
    assert (
        save_images(images(1), ["a cat"], 1, tmp_path, {"seed": 0})[0].is_file()
        and not (tmp_path / "grid.png").exists()
    )
    assert "grid.png was not drawn" in capfd.readouterr().err
