"One evaluation, in memory or in a folder: whose images are whose, what survives interruptions, what is refused."

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vgpo.evaluate import main, settings_of
from vgpo.evaluation.folder import (
    EvaluationFolder,
    complete_scores,
    draw_missing,
    evaluate_in_folder,
    open_folder,
    read_image,
    read_score_files,
    score_missing,
)
from vgpo.evaluation.images import EvaluationConfig, draw_samples, generate_images
from vgpo.evaluation.scores import Evaluation, concatenate, evaluate, load_evaluation, read_evaluation
from vgpo.policies.base import load_policy
from vgpo.policies.loading import ModelConfig
from vgpo.prompts.files import load_prompts
from vgpo.rewards.base import Reward, RewardError, Scores
from vgpo.rewards.own import JPEG
from vgpo.world.detector import GenEvalShapes

ALONE = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
TWO = EvaluationConfig(num_inference_steps=2)
ROWS = [{"prompt": f"a photo of a {color} circle", "tag": tag} for color, tag in zip(
    ("red", "green", "blue", "red", "green"), "aabbb", strict=True)]  # fmt: skip


@dataclass
class Bright(Reward):
    "A reward with a verdict; it counts the images that it saw."

    name, scale, version = "bright", "none", "1"
    seen: int = 0

    def __call__(self, images, prompts, metadata):
        self.seen += len(images)
        raw = torch.tensor(images.reshape(len(images), -1).mean(1) / 255, dtype=torch.float32)
        return Scores(raw, raw, raw > 0.5, [{"prompt": prompt} for prompt in prompts])


def rows(count):
    return load_prompts("tiny-scenes", "test", unique=True)[:count]


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_policy(ModelConfig(path=str(tiny_folder)))


def take(f, policy, makers=None, state=ALONE, config=TWO):
    "Hold an evaluation in a folder with a policy at hand; returns the settings."
    settings = settings_of(f, "tiny-scenes", ModelConfig(path="tiny"), config)
    evaluate_in_folder(f, settings, lambda: policy, makers or {"bright": Bright}, config, state)
    return settings


def raw(f, name="bright"):
    return complete_scores(f, name).raw.tolist()


# --- in memory


def result(strict, rows=ROWS[:2], clusters=None):
    values = torch.tensor(strict).float()
    scores = Scores(values, values, values > 0, [{}] * len(values))
    return Evaluation(
        rows, {"reward": scores}, np.zeros((len(values), 4, 4, 3), np.uint8), list(range(len(values))), clusters
    )


def test_summary_counts_tasks_not_images():
    values = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    found = Evaluation(ROWS, {"reward": Scores(values, values / 2, values > 0)}, None, []).summary["reward"]
    assert found["strict"]["mean"] == 0.75 and found["scaled"]["mean"] == 0.375
    means = {key: {task: part["mean"] for task, part in found[key]["by_task"].items()} for key in ("strict", "scaled")}
    assert means == {"strict": {"a": 0.5, "b": 1.0}, "scaled": {"a": 0.25, "b": 0.5}}
    assert sum(part["images"] for part in found["raw"]["by_task"].values()) == 5
    plain = Evaluation([{"prompt": "x"}] * 5, {"reward": Scores(values, values)}, None, [])
    assert "strict" not in plain.summary["reward"] and list(plain.summary["reward"]["raw"]["by_task"]) == ["all"]


def test_change_is_paired():
    "Two images of one task swap: each column has an error, and the change one of its own."

    def change(after, before):
        return result(after).change_from(result(before))["reward"]

    assert (change([1, 0], [1, 0])["strict"]["mean"], change([1, 0], [1, 0])["strict"]["stderr"]) == (0.0, 0.0)
    found = change([1, 1], [0, 0])["strict"]["by_task"]["a"]
    assert (found["mean"], found["stderr"]) == (1.0, 0.0)
    found = change([1, 0], [0, 1])["scaled"]
    assert (found["mean"], found["stderr"], found["ci95"]) == (0.0, 1.0, [-1, 1])
    found = result([1, 0], clusters=[0, 0]).change_from(result([0, 1], clusters=[0, 0]))["reward"]["scaled"]
    assert found["stderr"] == 1.0  # of a single cluster nothing is known but the bound
    for other in (ROWS[2:4], [ROWS[0], ROWS[1] | {"tag": "b"}], ROWS[:1]):
        with pytest.raises(ValueError, match="different rows: evaluate the same prompts"):
            result([1, 0]).change_from(result([1, 0][: len(other)], other))


def test_words_and_metrics_of_an_evaluation():
    before, after = result([1, 0]), result([1, 1])
    assert before.describe() == "accuracy 0.500 ± 0.500, reward 0.500"
    values = torch.tensor([0.5])
    plain = Evaluation([{"prompt": "x"}], {"reward": Scores(values, values)}, None, [])
    assert plain.describe() == "reward 0.500" and plain.metrics() == {"eval/reward": 0.5}
    assert after.metrics(before) == {"eval/reward": 1.0, "eval/accuracy": 1.0, "eval/reward_change": 0.5,
                                     "eval/reward_stderr": 0.5}  # fmt: skip
    for evaluation in (before, after):
        evaluation.scores["validation"] = evaluation.scores["reward"]
        evaluation.__post_init__()
    found = after.metrics(before)
    assert found["eval/validation_reward"] == 1.0 and found["eval/validation_reward_change"] == 0.5
    assert found["eval/validation_reward_stderr"] == 0.5 and len(found) == 7


def test_kept_it_is_the_same(tmp_path):
    found = result([1, 0, 1, 1, 1], ROWS, [0, 1, 2, 0, 1])
    found.images[:] = np.arange(5)[:, None, None, None]
    found.save(tmp_path / "kept", shown=[4, 1])
    again = load_evaluation(tmp_path / "kept")
    assert again.summary == found.summary and again.rows == ROWS and again.clusters == found.clusters
    assert again.shown == [4, 1] and again.images[:, 0, 0, 0].tolist() == [4, 1]
    assert all(part["stderr"] == 0 for part in found.change_from(again)["reward"].values())


def test_images_depend_on_seed_and_row_alone(model):
    config = EvaluationConfig(num_inference_steps=3)

    def images(rows=ROWS, **options):
        return evaluate(model, {"reward": Bright()}, rows, config, **options).images.astype(int)

    whole = evaluate(model, {"reward": Bright()}, ROWS, config, seed=1)
    assert np.abs(whole.images - images(seed=1, batch_size=2)).max() <= 1
    assert np.abs(whole.images[:3] - images(ROWS[:3], seed=1)).max() <= 1
    assert all((a != b).any() for a, b in zip(whole.images, images(seed=2), strict=True))
    means = whole.images.reshape(5, -1).mean(1) / 255
    assert whole.reward == pytest.approx((means[:2].mean() + means[2:].mean()) / 2, abs=1e-6)


def test_bad_requests_are_named(model):
    with pytest.raises(ValueError, match="2 prompts but 1 noises"):
        generate_images(model, ["a", "b"], torch.zeros(1, *model.latent_shape))
    with pytest.raises(ValueError, match="no row to evaluate"):
        evaluate(model, {"reward": Bright()}, [], EvaluationConfig())


def test_parts_of_processes_are_put_together():
    verdicts = torch.tensor([True, False])
    parts = [Scores(torch.tensor([i, i + 0.5]), torch.zeros(2), verdicts, [{"i": i}, {"i": i}]) for i in (0.0, 1.0)]
    whole = concatenate(parts)
    assert whole.raw.tolist() == [0, 0.5, 1, 1.5] and whole.strict.tolist() == [True, False] * 2
    assert [detail["i"] for detail in whole.details] == [0, 0, 1, 1]
    assert concatenate([Scores(torch.zeros(1), torch.zeros(1))] * 2).strict is None


def test_a_stop_is_asked_for_before_each_batch(model):
    asked = []

    def proceed():
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, {"reward": Bright()}, ROWS, TWO, batch_size=2, proceed=proceed)
    assert len(asked) == 2


# --- in a folder


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 40])
def test_every_sample_is_of_exactly_one_process(processes):
    f = EvaluationFolder(Path(), [{}] * 11, 3, batch_size=4, processes=processes)
    shares = [replace(f, rank=rank).batches() for rank in range(processes)]
    assert sorted(sample for share in shares for batch in share for sample in batch) == f.samples()
    assert len(f.samples()) == len(set(f.samples())) == 33


def test_first_sample_is_that_of_memory_and_the_others_differ(model, tmp_path):
    f, config = EvaluationFolder(tmp_path / "f", rows(3)), EvaluationConfig(num_inference_steps=3)
    take(f, model, config=config)
    small = evaluate(model, {"bright": Bright()}, rows(3), config)
    assert np.array_equal([read_image(f.image_file(sample)) for sample in f.samples()], small.images)
    assert (
        raw(f) == small.scores["bright"].raw.tolist()
        and complete_scores(f, "bright").details == small.scores["bright"].details
    )
    assert read_evaluation(f, ["bright"], "image").summary == small.summary
    kept = evaluate(model, {"bright": Bright()}, rows(3), config, folder=tmp_path / "kept")
    assert kept.summary == small.summary and kept.change_from(small)["bright"]["raw"]["mean"] == 0
    more = EvaluationFolder(tmp_path / "more", rows(3), 2)
    take(more, model, config=config)
    for i in range(3):
        first, second = (read_image(more.image_file((i, k))).astype(int) for k in (0, 1))
        assert np.abs(first - small.images[i]).max() <= 1 < np.abs(first - second).max()


def test_what_is_there_is_not_made_again(model, tmp_path):
    f, bright = EvaluationFolder(tmp_path, rows(4), 2, batch_size=3), Bright()
    take(f, model, {"bright": lambda: bright})
    times = {sample: f.image_file(sample).stat().st_mtime_ns for sample in f.samples()}
    f.image_file((1, 1)).unlink()
    take(f, model, {"bright": lambda: pytest.fail("the reward is not needed")})
    assert [s for s in times if f.image_file(s).stat().st_mtime_ns != times[s]] == [(1, 1)] and bright.seen == 8
    take(f, None, {"jpeg": JPEG})  # another reward needs no policy
    assert len(raw(f, "jpeg")) == 8 and complete_scores(f, "jpeg").strict is None


def test_a_torn_line_is_scored_again(model, tmp_path):
    f = EvaluationFolder(tmp_path, rows(4), 2, batch_size=3)
    take(f, model)
    own = f.scores_folder("bright") / "00000.jsonl"
    whole, content = read_score_files(f, "bright"), own.read_bytes()
    for cut in (0, 10, content.index(b"\n"), content.index(b"\n") + 1, len(content) - 1):
        own.write_bytes(content[:cut])
        for rank in (1, 0):
            score_missing(replace(f, rank=rank, processes=2), "bright", Bright)
        assert read_score_files(f, "bright") == whole
        (f.scores_folder("bright") / "00001.jsonl").unlink(missing_ok=True)
    own.write_bytes(b"no end of line")
    score_missing(f, "bright", Bright)
    assert own.read_bytes() == content


def test_damage_is_named_with_its_remedy(model, tmp_path):
    f = EvaluationFolder(tmp_path, rows(2), 2)
    take(f, model)
    own = f.scores_folder("bright") / "00000.jsonl"
    lines = own.read_text().splitlines(keepends=True)
    for bad, message in (
        ("{}\n", "line 2: not a score; delete the line"), ("\n", "line 2: not a score"), ("\x80\n", "line 2: not"),
        (lines[0], "line 2: is the second of its image"), (lines[1].replace("0.", "NaN, 0."), "line 2: not a score"),
        (lines[1].replace('"prompt": 0', '"prompt": 9'), "line 2: is of no image of this evaluation"),
    ):  # fmt: skip
        own.write_text("".join([lines[0], bad, *lines[2:]]))
        with pytest.raises(ValueError, match=message) as error:
            take(f, model)
        assert str(own) in str(error.value) and "run the same command again" in str(error.value)
    own.write_text("".join(lines[:3]))
    with pytest.raises(ValueError, match="lacks 1 of 4, the first being the score by bright of 00001-1"):
        complete_scores(f, "bright")
    f.image_file((1, 1)).write_bytes(f.image_file((1, 1)).read_bytes()[:100])
    with pytest.raises(ValueError, match="00001-1.png is damaged .*delete it and run the same command again"):
        take(f, model)
    f.image_file((1, 1)).unlink()
    with pytest.raises(ValueError, match="the first being the image of 00001-1"):
        complete_scores(f, "bright")
    take(f, model)
    assert len(raw(f)) == 4
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json is damaged .*give another --output"):
        take(f, model)


def test_other_settings_are_refused_and_named(model, tmp_path):
    f = EvaluationFolder(tmp_path / "evaluation", rows(2))
    settings = settings_of(f, "tiny-scenes", ModelConfig(path="tiny"), TWO)
    open_folder(f, settings | {"seed": 5}, ALONE)  # no image yet, so nothing is spoilt by another beginning
    take(f, model)
    for key, value in {
        "num_inference_steps": 3,
        "seed": 1,
        "guidance_scale": 2.0,
        "trained": "lora",
        "dtype": "bfloat16",
    }.items():
        with pytest.raises(ValueError, match=f"{key} is {settings[key]} there and {value} here; give another --output"):
            open_folder(f, settings | {key: value}, ALONE)
    newer = Bright()
    newer.version = "2"
    (f.scores_folder("bright") / "00000.jsonl").unlink()
    with pytest.raises(ValueError, match="bright has scores of another reward: version is 1 there and 2 here; delete"):
        take(f, model, {"bright": lambda: newer})
    (tmp_path / "file").write_text("x")
    for folder, message in ((tmp_path, "not empty and holds no evaluation"), (tmp_path / "file", "is a file")):
        with pytest.raises(ValueError, match=message):
            open_folder(EvaluationFolder(folder, rows(2)), settings, ALONE)


def test_a_folder_of_other_prompts_or_noise_is_refused(model, tmp_path):
    "As many rows with other contents, which no name or number shows."
    evaluate(model, {"bright": Bright()}, ROWS[:2], TWO, folder=tmp_path / "f")
    with pytest.raises(ValueError, match="rows_sha256 is .* there and .* here"):
        evaluate(model, {"bright": Bright()}, ROWS[2:4], TWO, folder=tmp_path / "f")
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        evaluate(model, {"bright": Bright()}, ROWS[:2], TWO, folder=tmp_path / "f", seed=1)


def test_rewards_are_loaded_in_turn_and_tried_before_the_drawing(model, tmp_path):
    alive, drawn = weakref.WeakSet(), []

    class Loaded(Bright):
        __hash__ = object.__hash__

    def maker(name):
        def make():
            assert not alive, f"{name} is loaded beside {[r.name for r in alive]}"
            reward = Loaded()
            reward.name = name
            alive.add(reward)
            drawn.append(len(list((tmp_path / "images").iterdir())))
            return reward

        return make

    f = EvaluationFolder(tmp_path, rows(2))
    take(f, model, {name: maker(name) for name in ("a", "b", "c")})
    assert drawn == [0, 0, 0, 2, 2, 2]
    take(f, model, {"d": maker("d")})
    assert len(drawn) == 7  # a single one stays


def test_prompts_that_a_reward_refuses_are_found_before_the_drawing(tmp_path):
    f = EvaluationFolder(tmp_path, [{"prompt": "a photo of a cat"}])
    with pytest.raises(ValueError, match="prompt row 1: .*unknown tag None"):
        evaluate_in_folder(f, {}, lambda: pytest.fail("drawn"), {"scenes": GenEvalShapes}, TWO, ALONE)


def test_a_failing_reward_loses_nothing(model, tmp_path):
    f, bright = EvaluationFolder(tmp_path, rows(3), 2, batch_size=2), Bright()

    class Fails(Bright):
        name, scale, version = Bright.name, Bright.scale, Bright.version

        def __call__(self, images, prompts, metadata):
            if bright.seen == 4:
                raise RuntimeError("the reward is out")
            return bright(images, prompts, metadata)

    with pytest.raises(RewardError, match="the reward is out"):
        take(f, model, {"bright": Fails})
    assert len(read_score_files(f, "bright")) == 4 and len(list((tmp_path / "images").iterdir())) == 6
    take(f, None)
    assert len(raw(f)) == 6


def test_text_encoders_may_be_freed(tiny_folder, model, tmp_path):
    "A policy that drops its encoders has to know all prompts at the first batch."
    free = load_policy(ModelConfig(path=str(tiny_folder), precompute_text_embeds=True))
    for name, policy in (("free", free), ("kept", model)):
        (tmp_path / name / "images").mkdir(parents=True)
        draw_missing(EvaluationFolder(tmp_path / name, rows(4), batch_size=2), lambda policy=policy: policy, TWO)
    names = [path.name for path in (tmp_path / "kept" / "images").iterdir()]
    for name in names:
        assert (tmp_path / "free/images" / name).read_bytes() == (tmp_path / "kept/images" / name).read_bytes()
    assert free.pipe.text_encoder is None and len(names) == 4


def test_odd_prompts_and_names_reach_the_disk_and_come_back(model, tmp_path):
    prompts = ["a price of $$5", "100% of \\frac{a}{b}", "../up\\n%s", "зелёный 三 \u2028 line"]
    f = EvaluationFolder(tmp_path, [{"prompt": prompt} for prompt in prompts])
    take(f, model, {"../odd: $%\\ name": Bright})
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["..-odd------name"]
    kept = [
        json.loads(line)["prompt"]
        for line in (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").split("\n")
        if line
    ]
    assert kept == prompts == [detail["prompt"] for detail in complete_scores(f, "../odd: $%\\ name").details]
    assert (draw_samples(model, f.rows, [(2, 0)], TWO)[0] == read_image(f.image_file((2, 0)))).mean() > 0.9


def launch(words, rank=0, processes=1, port=0):
    "The program in a process of its own, as accelerate launch would start it on CPUs."
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    if processes > 1:
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    command = [sys.executable, "-m", "vgpo.evaluate", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_and_continued_by_two_processes_it_ends_like_an_unbroken_one(tiny_folder, tmp_path, one_thread, capsys):
    words = [str(tiny_folder), "--num_samples=24", "--images_per_prompt=3", "--batch_size=2",
             "--num_inference_steps=12", "--rewards", "GenEvalShapes", "tiny_rewards:brightness",
             "--output"]  # fmt: skip
    main([*words, str(tmp_path / "whole")])
    folder = tmp_path / "broken"
    killed = launch([*words, str(folder)])
    while len(list(folder.glob("images/*.png"))) < 4:
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    assert 4 <= len(list(folder.glob("images/*.png"))) < 24
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [launch([*words, str(folder)], rank, 2, port) for rank in (0, 1)]
    texts = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert capsys.readouterr().out in texts[0] and "mean over tasks" not in texts[1]
    for path in (tmp_path / "whole" / "images").iterdir():
        assert (folder / "images" / path.name).read_bytes() == path.read_bytes()
    for name in ("results.json", "table.md", "prompts.jsonl", "settings.json"):
        assert (folder / name).read_text() == (tmp_path / "whole" / name).read_text()
    shares = [len(path.read_text().splitlines()) for path in sorted(folder.glob("scores/GenEvalShapes/*.jsonl"))]
    assert shares == [12, 12] and json.loads((folder / "results.json").read_text())["images"] == 24


@pytest.mark.parametrize("part", ["transformer", "in memory", "text_encoder", "scheduler"])
def test_a_folder_of_another_policy_is_refused(tiny_folder, tmp_path, part):
    "Whether its model was changed where it lies, or only in memory, as by training."
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    policy = load_policy(ModelConfig(path=str(folder)))
    evaluate(policy, {"bright": Bright()}, ROWS[:2], TWO, folder=tmp_path / "f")
    evaluate(policy, {"bright": Bright()}, ROWS[:2], TWO, folder=tmp_path / "f")
    if part == "in memory":
        list(policy.network.parameters())[-1].view(-1)[-1:].add_(1e-3)
    elif part == "scheduler":
        file = folder / "scheduler" / "scheduler_config.json"
        file.write_text(file.read_text().replace('"shift": 3.0', '"shift": 2.0'))
    else:
        (file,) = (folder / part).glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-4] + b"1111")
    if part != "in memory":
        policy = load_policy(ModelConfig(path=str(folder)))
    name = "weights" if part == "in memory" else f"model.{part}"
    with pytest.raises(ValueError, match=f"with other settings: .*{name} is .* there and .* here"):
        evaluate(policy, {"bright": Bright()}, ROWS[:2], TWO, folder=tmp_path / "f")
