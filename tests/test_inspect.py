"""What a run keeps for `vgpo inspect`, and the page: the same numbers as the trainer's, no change of a weight, no network.

The page's numbers are checked against the micro-batches that a callback has copied while the run went on, by loops in
float64.
"""

import base64
import io
import json
import re
import shutil
from types import SimpleNamespace as Any

import numpy as np
import pytest
import torch
from PIL import Image

import vgpo.train as program
from vgpo.callback import Callback
from vgpo.evaluation.scores import Evaluation
from vgpo.inspect import inspect_page, main, run_data, write_page
from vgpo.rewards.base import Scores
from vgpo.runs.callbacks import SIDE, SaveStrips, held_out_facts, image_sheet, thumbnail
from vgpo.runs.checkpoint import trainer_state
from vgpo.world.pretrain import make_autoencoder, make_pipeline

SMALL = [
    *("--epochs=2", "--save_every=1", "--model.lora_rank=4", "--reward=tiny_rewards:brightness", "--tracker=[]"),
    *("--rollout.prompts_per_epoch=3", "--rollout.group_size=4", "--rollout.num_inference_steps=5", "--window.size=3"),
    *("--rollout.micro_batch_size=2", "--optim.num_minibatches=2", "--optim.lr=1e-3", "--credit.num_scored_steps=3"),
    *("--evaluation.num_samples=6", "--evaluation.num_inference_steps=1", "--evaluation.eval_every=1"),
]
ODD = 'a photo of "a" <b>cross</b> </script> & more'  # a prompt that a careless page would run or swallow


class Record(Callback):
    "Copies the numbers of each epoch."

    def __init__(self):
        self.epochs = []

    def after_epoch(self, trainer):
        def all_of(get):
            return torch.cat([get(batch) for batch in trainer.batches]).clone()

        rewards, advantages = all_of(lambda b: b.rewards), all_of(lambda b: b.advantages)
        self.epochs.append(
            {"rewards": rewards, "advantages": advantages, "group": all_of(lambda b: b.path.group)}
            | {"images": np.concatenate([batch.images for batch in trainer.batches]), "metrics": dict(trainer.metrics)}
            | {"trained": all_of(lambda b: b.noisy), "prompts": [r["prompt"] for b in trainer.batches for r in b.rows]}
        )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A folder with a small model and prompts."
    root = tmp_path_factory.mktemp("inspect")
    torch.manual_seed(0)
    pipe = make_pipeline(make_autoencoder(channels=8), width=64, layers=1)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.1)
    pipe.save_pretrained(root / "model")
    (root / "prompts.txt").write_text("\n".join([ODD, *(f"a photo of {n} circles" for n in "two three four".split())]))
    return root


def words(root, *more):
    places = {"model.path": root / "model", "prompts.train": root / "prompts.txt", "output_dir": root}
    return [*SMALL, *(f"--{option}={path}" for option, path in places.items()), *more]


def begun(root, *more):
    "A Session and its Record."
    session, record = program.begin(words(root, *more)), Record()
    session.trainer.callbacks.append(record)
    return session, record


@pytest.fixture(scope="module")
def run(root):
    "The folder of a run that has ended, and what was recorded of it."
    session, record = begun(root, "--name=kept")
    session.run()
    session.lock.release()
    return session.folder, record.epochs


@pytest.fixture(scope="module")
def page(run):
    "What the page shows of it."
    return run_data(run[0])


def read(folder, epoch):
    return json.loads((folder / "inspect" / f"epoch-{epoch:05d}.json").read_text())


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "inspect").iterdir()}


def image_of(sheet, cell):
    "A cell of a sheet, (h, w, 3)."
    image = Image.open(io.BytesIO(base64.b64decode(sheet["url"].partition(",")[2]))).convert("RGB")
    x, y = cell % sheet["columns"] * sheet["width"], cell // sheet["columns"] * sheet["height"]
    return np.asarray(image.crop((x, y, x + sheet["width"], y + sheet["height"]))).astype(float)


# --- what is kept ---


def test_what_is_kept_is_what_the_trainer_had(run):
    folder, epochs = run
    assert sorted(files(folder)) == ["after.json", "before.json", "epoch-00000.json", "epoch-00001.json"]
    for epoch, had in enumerate(epochs):
        kept = read(folder, epoch)
        order = [i for g in dict.fromkeys(kept["group"]) for i in (had["group"] == g).nonzero()[:, 0].tolist()]
        assert kept["group"] == had["group"][order].tolist() and kept["of"] == len(order) == 12
        for name in ("rewards", "advantages", "trained"):
            assert np.allclose(kept[name], had[name][order].double(), rtol=1e-5, atol=1e-12), name
        assert [kept["prompts"][str(g)]["prompt"] for g in kept["group"]] == [had["prompts"][i] for i in order]
        assert kept["states"] == kept["frames"] == [2, 3, 5]
        for place, cell in kept["strips"].items():  # the last frame is the finished image
            shown, drawn = image_of(kept["sheet"], cell + 2), had["images"][order[int(place)]]
            assert abs(shown - np.asarray(thumbnail(drawn))).mean() < 12
        ranked = sorted(range(12), key=lambda i: -had["rewards"][i, -1])
        assert [order[int(i)] for i in kept["best"]] == ranked[:8]
        assert [order[int(i)] for i in kept["worst"]] == ranked[:-9:-1]


def test_statistics_of_steps_have_the_means_of_the_log(run):
    for epoch, had in enumerate(run[1]):
        stats = read(run[0], epoch)["stats"]
        assert stats["steps"] == [0, 1, 2]
        for name in ("ratio/abs_dev_mean", "clip_ratio", "approx_kl", "loss"):
            table = np.array(stats["updates"][name])
            assert table.shape == (2, 3)
            assert table.mean() == pytest.approx(had["metrics"][name], rel=1e-4, abs=1e-9)
        ratio = np.array(stats["updates"]["ratio/abs_dev_mean"])
        assert not ratio[0].any() and ratio[1].all()


def test_little_is_kept_of_a_large_epoch(tmp_path):
    "Two groups, eight images, ten frames, 96 pixels; numbers of whole groups, and the file says of how many."
    keep = SaveStrips(tmp_path)
    keep.images = 50
    assert [keep.frame_places(list(range(n)))[-1] + 1 for n in (1, 10, 41)] == [1, 10, 41]
    assert [len(keep.frame_places(list(range(n)))) for n in (1, 10, 41)] == [1, 10, 10]
    keep.keeping, keep.strips, keep.seen = True, {}, 0
    alone = Any(is_main_process=True, num_processes=1, gather=lambda tensor: tensor)
    trainer = Any(states=[1, 2], accelerator=alone, device="cpu", config=Any(group_size=12))
    group, rng = torch.arange(5).repeat(12), np.random.default_rng(0)
    batch = Any(path=Any(group=group), rows=[{"prompt": f"p{g}"} for g in group.tolist()])
    keep.after_decode(trainer, batch, rng.integers(0, 256, (120, 8, 300, 3), dtype=np.uint8))
    assert [*keep.strips] == [0, 1] and [len(found) for found in keep.strips.values()] == [8, 8]
    strip = keep.strips[1][1]
    assert len(strip) == 2 and strip[0].size == (SIDE, 3)
    batch.noisy, batch.rewards, batch.advantages = torch.ones(60, 2, dtype=bool), torch.rand(60, 3), torch.rand(60, 2)
    trainer.batches = [batch]
    facts, places = keep.numbers(trainer)
    assert facts["of"] == 60 and len(facts["group"]) == 48 == len(places) and facts["group"] == sorted(facts["group"])
    assert torch.allclose(torch.tensor(facts["rewards"]), batch.rewards[list(places)], rtol=1e-5)
    assert image_sheet([]) is None


def test_the_weights_are_the_same_bit_for_bit_with_and_without(root, run, tmp_path):
    session, record = begun(root, "--name=nothing", "--inspect_epochs=0")
    session.run()
    session.lock.release()
    assert not (session.folder / "inspect").exists()
    assert all(torch.equal(a["advantages"], b["advantages"]) for a, b in zip(record.epochs, run[1], strict=True))
    other = program.resume(["--resume", str(run[0])])
    other.lock.release()
    mine, its = trainer_state(session.trainer)[0], trainer_state(other.trainer)[0]
    assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)
    page = run_data(session.folder)
    assert (
        not page["epochs"]
        and page["curves"]["reward"]
        and page["table"]
        and page["figure"].startswith("data:image/png")
    )
    assert page["held"]["after"] is None and len(page["held"]["items"]) == 6  # those of the evaluation before
    said = " ".join(page["notes"])
    assert "No film strips were kept" in said and "--inspect_epochs 8" in said and "the sheet of the report" in said


def test_a_run_that_is_killed_and_resumed_keeps_what_an_unbroken_one_keeps(root, run):
    session, _ = begun(root, "--name=broken")
    session.before = session.evaluate_before()
    session.trainer.train_epoch()
    session.trainer.train_epoch()
    session.lock.release()
    shutil.rmtree(sorted((session.folder / "checkpoints").glob("epoch-*"))[-1])  # of the second epoch, not yet saved
    kept = session.folder / "inspect"
    (kept / "epoch-00001.json").write_text("half")
    (kept / "epoch-00007.json").write_text("of a time that is undone")
    again = program.resume(["--resume", str(session.folder)])
    again.run()
    again.lock.release()
    assert files(session.folder) == files(run[0])


def test_a_run_that_is_prolonged_keeps_no_more_than_it_may(root):
    session, _ = begun(
        root, "--name=long", "--inspect_epochs=3", "--epochs=5", "--save_every=5", "--optim.lr_scheduler=constant"
    )
    session.run()
    session.lock.release()
    assert sorted(files(session.folder)) == ["after.json", "before.json", *(f"epoch-0000{n}.json" for n in (0, 2, 4))]
    again = program.resume(["--resume", str(session.folder), "--epochs=9"])
    again.run()
    again.lock.release()
    assert [found["epoch"] for found in run_data(session.folder)["epochs"]] == [0, 4, 8]


@pytest.mark.parametrize("more", [
    ["--credit=GRPO", "--objective=NFT"],
    ["--window=OneStep", "--window.size=1", "--credit=GRPO", "--rollout.group_size=8", "--rollout.micro_batch_size=3"],
    ["--credit=Gains", "--rollout.async_scoring=true"],
    ["--credit=DecoupledVGPO", "--credit.num_scored_steps=2",
     "--reward={class_path: Combined, init_args: {rewards: {a: JPEG, b: {class_path: JPEG, init_args: {quality: 50}}}, weights: {a: 1, b: 1}}}"],
])  # fmt: skip
def test_runs_of_every_kind_have_a_page(root, more):
    plain = [word for word in words(root, "--epochs=1") if not word.startswith(("--credit", "--reward="))]
    session = program.begin(
        [*plain, *(["--reward=tiny_rewards:brightness"] if "--reward" not in more[-1] else []), *more]
    )
    session.run()
    session.lock.release()
    page = run_data(session.folder)
    (epoch,) = page["epochs"]
    scored = session.trainer.states
    assert epoch["frames"] == scored and all(
        sample["cell"] % len(scored) == 0 for g in epoch["groups"] for sample in g["samples"]
    )
    if "--window=OneStep" in more:
        assert epoch["stats"]["steps"] is None and all(
            sum(s["trained"]) == 1 for g in epoch["groups"] for s in g["samples"]
        )
    if "--credit=GRPO" in more:
        assert "VGPO (1 scored)" in epoch["estimators"] and dict(epoch["skipped"])["Gains"].startswith(
            "needs the states 0"
        )
    if "--credit=Gains" in more:
        assert "VGPO" in epoch["estimators"] and epoch["states"] == [0, 1, 2, 3, 4, 5]
    inspect_page(page)


# --- the page's numbers ---


def test_values_weights_and_what_grpo_would_have_paid_by_loops(run, page):
    assert page["paid"] == "VGPO" and page["gamma"] == "0.9"
    for had, epoch in zip(run[1], page["epochs"], strict=True):
        assert epoch["estimators"][0] == "GRPO" and not {"VGPO", "Gains"} & {*epoch["estimators"]}
        assert {name for name, _ in epoch["skipped"]} >= {"Gains", "GDPO", "DecoupledVGPO"}
        assert len(epoch["groups"]) == 2
        for group in epoch["groups"]:
            mine = [i for i, prompt in enumerate(had["prompts"]) if prompt == group["prompt"]]
            final = [float(had["rewards"][i, -1]) for i in mine]
            mean = sum(final) / len(final)
            std = (sum((r - mean) ** 2 for r in final) / len(final)) ** 0.5
            assert group["mean"] == pytest.approx(mean, rel=1e-5) and group["std"] == pytest.approx(std, rel=1e-3)
            assert [s["rewards"][-1] for s in group["samples"]] == pytest.approx(sorted(final, reverse=True), rel=1e-5)
            for sample in group["samples"]:
                i = min(mine, key=lambda i: abs(float(had["rewards"][i, 2]) - sample["rewards"][2]))
                rewards = had["rewards"][i].double().tolist()
                assert sample["rewards"] == pytest.approx(rewards, rel=1e-5)
                values = [sum(0.9 ** (k - j) * rewards[k + 1] for k in range(j, 5)) for j in range(5)]
                assert sample["values"] == pytest.approx(values, rel=1e-4)
                assert sample["weights"] == pytest.approx([v / (sum(values) / 5) for v in values], rel=1e-4)
                grpo = max(-5, min(5, (rewards[-1] - mean) / (std + 1e-4)))
                assert sample["advantages"]["GRPO"] == pytest.approx([grpo] * 5, abs=2e-3)
                assert sample["advantages"]["paid"] == pytest.approx(had["advantages"][i].tolist(), rel=1e-4, abs=1e-6)
                assert sample["trained"] == [1, 1, 1, 0, 0]


def test_outcomes_are_counted_over_all_images(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    rng, tags = np.random.default_rng(0), [f"task {i % 3}" for i in range(300)]
    right = {name: rng.integers(0, 2, 300).tolist() for name in ("before", "after")}
    for name, strict in right.items():
        shown = list(range(0, 300, 4))
        cells = [thumbnail(np.full((8, 8, 3), 80 * (1 + strict[i]), np.uint8)) for i in shown]
        facts = {
            "tags": tags,
            "scaled": [s / 2 for s in strict],
            "strict": strict,
            "shown": shown,
            "sheet": image_sheet(cells),
        }
        (folder / "inspect" / f"{name}.json").write_text(
            json.dumps(facts | {"prompts": [f"prompt {i}" for i in shown]})
        )
    held = run_data(folder)["held"]
    say = {1: "right", 0: "wrong"}
    expected = {tag: {} for tag in sorted({*tags})}
    for tag, a, b in zip(tags, right["before"], right["after"], strict=True):
        name = f"{say[a]} → {say[b]}"
        expected[tag][name] = expected[tag].get(name, 0) + 1
    assert held["counts"] == expected and len(held["items"]) == 75 and held["total"] == 300
    item = held["items"][10]
    assert (item["row"], item["outcome"]) == (40, f"{say[right['before'][40]]} → {say[right['after'][40]]}")
    assert abs(image_of(held["after"], item["after"]["cell"]).mean() - 80 * (1 + right["after"][40])) < 4


def test_held_out_images_are_as_many_of_each_task():
    rows = [{"prompt": str(i), "tag": "rare" if i % 10 == 0 else "often"} for i in range(400)]
    scores = Scores(torch.rand(400), torch.rand(400))
    facts = held_out_facts(
        Evaluation(rows, {"reward": scores}, np.zeros((400, 200, 100, 3), np.uint8), list(range(400)))
    )
    assert sum(i % 10 == 0 for i in facts["shown"]) == 40 and len(facts["shown"]) == 40 + 48
    assert facts["sheet"]["width"] == 48 and facts["strict"] is None and len(facts["scaled"]) == 400


def test_the_page_is_one_file_that_asks_nobody(run, page):
    text = inspect_page(page)
    assert not re.findall(
        r"https?:|src=\"(?!\$|data:)|@import|//[a-z]+\.", re.sub(r"data:image/\w+;base64,[\w+/=]+", "", text)
    )
    assert "default-src 'none'" in text and "connect-src" not in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    assert json.loads(data)["runs"][0] == json.loads(json.dumps(page)) and text.count("</script>") == 2
    assert ODD in json.dumps(page["epochs"], ensure_ascii=False).replace('\\"', '"')
    assert "<title>kept</title>" in text
    assert len(text) < 400_000


def test_what_cannot_be_shown_is_said_in_one_line(run, tmp_path):
    def refused(*argv):
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in argv])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is not a run: it has no config.yaml" in refused(tmp_path)
    assert "is not a run" in refused(run[0], tmp_path / "nowhere")
    assert "is a folder; --output is the page's file" in refused(run[0], "--output", tmp_path)
    copy = shutil.copytree(run[0], tmp_path / "run")
    (copy / "inspect" / "epoch-00001.json").write_text('{"epoch": 1')
    assert "epoch-00001.json is damaged" in refused(copy)
    (copy / "inspect" / "epoch-00001.json").unlink()
    with open(copy / "metrics.jsonl", "a") as log:
        log.write('{"epoch": 2, "rew')  # killed while it wrote
    assert [epoch["epoch"] for epoch in run_data(copy)["epochs"]] == [0]
    (copy / "results.json").unlink()
    assert any("has not ended" in note for note in run_data(copy)["notes"])


def test_the_report_links_to_the_page_and_names_the_command(run, capsys):
    report = (run[0] / "report.md").read_text()
    assert "[inspect.html](inspect.html)" in report and f"python -m vgpo.inspect {run[0]}" in report
    main([str(run[0])])
    assert (run[0] / "inspect.html").is_file() and "inspect.html" in capsys.readouterr().out


# --- the page in a real browser ---


@pytest.fixture
def opened(window):
    "A function that opens a page and waits until it is drawn."

    def show(path, width=1200):
        window.resize(width)
        window.said()
        window.open(path.as_uri())
        window.wait("document.querySelector('.results') && document.querySelectorAll('.chart').length > 0")
        return window

    yield show
    assert window.said() == []


def click(page, selector):
    "Click on an element in the middle of the window, where no bar covers it."
    page.run(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
    page.click(selector)


def text(page, selector):
    return page.run(f"return [...document.querySelectorAll({selector!r})].map(e => e.textContent.trim())")


def test_pickers_change_what_is_shown(opened, run, page):
    seen = opened(write_page(run[0]))
    shown = page["epochs"][-1]["groups"][0]
    assert f"“{shown['prompt']}”" in text(seen, ".prompt")[0]  # letter by letter, markup and all
    assert seen.run("return document.querySelectorAll('#strips .row').length") == 4
    cells = text(seen, ".row:nth-of-type(2) .heat:first-child i")
    paid = shown["samples"][0]["advantages"]["paid"]
    assert [float(cell.replace("−", "-")) for cell in cells] == [float(f"{v:.1f}") for v in paid]
    click(seen, "button[data-epoch='0']")
    other = page["epochs"][0]["groups"]
    assert other[0]["prompt"] in text(seen, ".prompt")[0] and "epoch 0" in text(seen, ".group > .soft")[0]
    click(seen, "button[data-group='1']")
    assert other[1]["prompt"] in text(seen, ".prompt")[0]
    name = page["epochs"][0]["estimators"][1]
    click(seen, f"button[data-other='{name}']")
    assert name in text(seen, ".heads .name") and name in text(seen, ".verdict")[0]
    click(seen, ".row[data-sample='2'] .strip")
    assert seen.run("return document.querySelector('.bars').dataset.rank") == "2"
    value = other[1]["samples"][2]["values"][0]
    assert f"step 0: {value:.3f}" in text(seen, ".bars > div:nth-child(2) title")
    seen.run("document.querySelector('.row[data-sample=\"1\"] .strip').focus()")
    seen.press("Enter")
    assert seen.run("return document.querySelector('.bars').dataset.rank") == "1"
    assert seen.run("return document.activeElement.getAttribute('aria-label')").startswith("image 2")
    drawn = seen.run("return getComputedStyle(document.querySelector('.thumb')).backgroundImage.slice(0, 28)")
    assert drawn.startswith('url("data:image/webp')
    assert [words.split()[0] for words in text(seen, "#ratios caption, #ratios p b")][0] == "ratio/abs_dev_mean"
    assert "clip_ratio" in text(seen, "#ratios .stats")[0]


def test_filters_show_what_they_say(opened, run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    for name, strict in (("before", [0, 1, 0, 1] * 15), ("after", [1, 1, 0, 0] * 15)):
        cells = [thumbnail(np.full((8, 8, 3), 9, np.uint8))] * 60
        facts = {
            "tags": [f"task {i // 30}" for i in range(60)],
            "scaled": strict,
            "strict": strict,
            "shown": list(range(60)),
        }
        facts |= {"sheet": image_sheet(cells), "prompts": [f"prompt {i}" for i in range(60)]}
        (folder / "inspect" / f"{name}.json").write_text(json.dumps(facts))
    seen = opened(write_page(folder))
    assert len(text(seen, ".pair")) == 24 and "page 1 of 3" in text(seen, ".pager")[0]
    click(seen, "button[data-page='1']")
    assert text(seen, ".pair p")[0] == "prompt 24"
    click(seen, "button[data-outcome0='wrong → right']")
    assert [*map(int, (p.split()[-1] for p in text(seen, ".pair p")))] == list(range(0, 60, 4))
    assert "wrong → right (15)" in text(seen, "button")
    click(seen, "button[data-task='task 1']")
    assert [*map(int, (p.split()[-1] for p in text(seen, ".pair p")))] == [i for i in range(30, 60) if i % 4 == 0]
    assert "wrong → right (7)" in text(seen, "button") and "7 of the 60 images" in text(seen, ".count")[0]


@pytest.mark.parametrize("width", [375, 1200])
def test_two_runs_share_the_page(opened, root, run, tmp_path, width):
    other = root / "paid-by-grpo"
    if not other.exists():
        plain = [word for word in words(root, "--name=paid-by-grpo") if not word.startswith("--credit")]
        session = program.begin([*plain, "--credit=GRPO"])
        session.run()
        session.lock.release()
    path = write_page(run[0], other)
    assert path.name == "inspect-paid-by-grpo.html"
    seen = opened(path, width)
    assert text(seen, "h1") == ["A kept", "B paid-by-grpo"]
    prompts = text(seen, ".prompt")
    assert len(prompts) == 2 and prompts[0][2:] == prompts[1][2:]  # the same prompt of the same epoch
    assert seen.run("return document.querySelectorAll('.chart[data-key=reward] path.thick').length") == 2
    assert text(seen, ".heads .name")[0] == "paid: VGPO" and "paid: GRPO" in text(seen, ".heads .name")
    assert len(text(seen, ".pair:first-child figure")) == 3  # before, and after each
    assert seen.run("return document.documentElement.scrollWidth <= innerWidth && innerWidth") == width
    wide = "[...document.querySelectorAll('main *, header *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1"
    assert seen.run(f"return {wide} && !e.closest('.scroll, .strip, .sides, svg')).map(e => e.outerHTML)") == []


def test_runs_without_strips_or_epochs_have_a_page_too(opened, root, run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "old")
    shutil.rmtree(folder / "inspect")
    seen = opened(write_page(folder))
    assert "No film strips were kept" in text(seen, ".note")[0] and text(seen, ".results img") == [""]
    assert text(seen, "#strips .groups") == ["No film strips were kept."]
    assert len(text(seen, ".results tbody tr")) == 1
    both = opened(write_page(folder, run[0]))
    assert text(both, ".prompt") and text(both, "h1") == ["A old", "B kept"]
