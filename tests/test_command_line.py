"What people type: keys that come twice, paths, numbers, functions in files, bytes that are no text, small terminals."

import ast
import importlib
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from plug_classes import plug_classes as subclasses

import vgpo.rewards
import vgpo.train as program
from vgpo.__main__ import PROGRAMS
from vgpo.command_line import import_name, joined_words, read_yaml
from vgpo.config import Config, import_plugs, parse_config, recipe_files, save_config
from vgpo.evaluate import EvaluateOptions, evaluate_parser
from vgpo.generate import GenerateOptions
from vgpo.generate import main as generate
from vgpo.plugs import PathName, Seed, check_fields, expand_path
from vgpo.rewards.base import Reward, make_reward
from vgpo.runs.checkpoint import save_checkpoint, sift
from vgpo.train import main as train


def refused(act, *arguments):
    "The one line with which something is refused."
    with pytest.raises((ValueError, OSError, SystemExit)) as caught:
        act(*arguments)
    line = str(caught.value)
    assert line and "\n" not in line
    return line


# --- a key that comes twice ---

TWICE = {  # text: (key, lines)
    "seed: 1\nepochs: 2\nseed: 1\n": ("seed", "lines 1 and 3"),
    "model:\n  path: tiny\n  fsdp: off\n  path: tiny\n": ("model.path", "lines 2 and 4"),
    "rollout: {group_size: 4, 'group_size': 8}": ("rollout.group_size", "line 1"),
    "credit:\n  init_args:\n    gamma: 0.5\n    gamma: 0.9\n": ("credit.init_args.gamma", "lines 3 and 4"),
    "reward: OCR\nseed: 3\nreward: {class_path: JPEG}\n": ("reward", "lines 1 and 3"),
    "callbacks:\n- class_path: a.B\n  init_args: {x: 1,\n    x: 2}\n": ("callbacks.0.init_args.x", "lines 3 and 4"),
    "optim: &optim {lr: 1e-3, lr: 1e-4}\nevaluation: {num_samples: 4}": ("optim.lr", "line 1"),
    "base: tiny-ocr\nbase: tiny-geneval\n": ("base", "lines 1 and 2"),
    "optim:\n  <<: {lr: 1e-3}\n  <<: {weight_decay: 0}\n": ("optim.<<", "lines 2 and 3"),
}  # fmt: skip


@pytest.mark.parametrize("text", TWICE)
def test_a_key_that_comes_twice_is_named_with_its_lines(recipe, text):
    key, lines = TWICE[text]
    for words in (recipe(text), recipe(f"base: {recipe(text, 'below')[1]}\n", "above")):
        line = refused(parse_config, words)
        assert f".yaml: {key} is given twice, in {lines}; put them together, or take one out" in line
        assert ("below.yaml" if "above" in words[1] else "mine.yaml") in line


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--reward", "{class_path: JPEG, class_path: OCR}"], "class_path"),
        (["--reward", '{"class_path": "OCR", "init_args": {"mode": "full", "mode": "full"}}'], "init_args.mode"),
        (["--optim", "{lr: 1e-3, weight_decay: 0, lr: 1e-3}"], "lr"),
        (["--window", "{class_path: Random, init_args: {size: 2, size: 3}}"], "init_args.size"),
    ],
)
def test_nor_may_it_on_the_command_line(words, key):
    assert f"{key} is given twice" in refused(parse_config, words)


def test_nor_in_the_recipe_of_a_run_that_is_resumed(tmp_path):
    save_config(Config(), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(f"{text}seed: 9\n")
    first = text.splitlines().index("seed: 0") + 1
    line = refused(train, ["--resume", str(tmp_path)])
    assert line.startswith(
        f"error: {tmp_path}/config.yaml: seed is given twice, in lines {first} and {len(text.splitlines()) + 1}"
    )
    assert "seed is given twice" in refused(generate, ["a cat", "--run", str(tmp_path)])


def test_what_yaml_allows_is_taken():
    assert read_yaml("low: &a {x: 1, y: 2}\nhigh: {<<: *a, x: 3}") == {
        "low": {"x": 1, "y": 2},
        "high": {"x": 3, "y": 2},
    }
    assert read_yaml("a: &a {x: 1}\nb: &b {z: 4}\nc: {<<: [*a, *b], x: 3}")["c"] == {"x": 3, "z": 4}
    deep = "x: {y: {z: &z {<<: {k: 1}, k: 2}}}\nw: {<<: *z, k: 3}"  # its node is flattened before it is constructed
    assert read_yaml(deep) == {"x": {"y": {"z": {"k": 2}}}, "w": {"k": 3}}
    assert read_yaml("optim: {lr: 1e-3}\nrollout: {lr: 1}") == {"optim": {"lr": 1e-3}, "rollout": {"lr": 1}}
    assert read_yaml("a: &a [1, *a]")["a"][0] == 1  # a list that holds itself
    bomb = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))
    assert len(read_yaml(bomb)) == 40  # 9**39 paths through it
    with pytest.raises(yaml.YAMLError, match="nested too deeply"):
        read_yaml("[" * 5000)


# --- paths ---


def path_options():
    "{name: dataclass, field} of every option that a dataclass of the package has, of a Config, a program or a plug."
    import_plugs()
    kinds = [Config, *(f.type for f in fields(Config) if is_dataclass(f.type)), EvaluateOptions, GenerateOptions]
    kinds += subclasses(Reward, vgpo.rewards)
    return {
        f"{kind.__name__}.{f.name}": (kind, f) for kind in kinds if is_dataclass(kind) for f in fields(kind) if f.init
    }


def is_path(f):
    return PathName in (f.type, *get_args(f.type))


PATHS = {name: pair for name, pair in path_options().items() if is_path(pair[1])}
HOME = {"~/x y": "{home}/x y", "~": "{home}", "~root/é": "{root}/é"}
WRONG = ["$HOME/x", "${USER}", "a/$x/b", "a/~/b", "~nobody-of-that-name/x", "a\0b"]


def explained(kind):
    "{field: the sentence below it} of a dataclass."
    found = {}
    for cls in reversed([c for c in kind.__mro__ if c.__module__.startswith("vgpo")]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for node, after in zip(body, body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
                found[node.target.id] = getattr(after.value, "value", "")
    return found


NO_PATHS = {
    "url",
    "revision",
    "lora_targets",
    "rewards",
}  # an address, what is in a repository, names of layers and classes


def test_every_option_that_reads_like_a_path_has_its_type():
    word = re.compile(
        r"\b(folders?|files?|paths?|director(y|ies)|dir|hub name)\b|_dir\b|^(output|weights|checkpoint)\b"
    )
    texts = (str, str | None, list[str], list[str] | None)
    strings = {
        name: (kind, f) for name, (kind, f) in path_options().items() if f.type in texts and f.name not in NO_PATHS
    }
    found = [name for name, (kind, f) in strings.items() if word.search(f"{f.name} {explained(kind).get(f.name, '')}")]
    assert not found and len(strings) > 10
    assert len(PATHS) > 20 and {"Config.output_dir", "ModelConfig.path", "PromptsConfig.test", "HPSv2.weights"} <= set(
        PATHS
    )


def check_alone(kind, f, value):
    "The value of one field of a class, of which nothing else is made, once `check_fields` has seen it."
    made = make_dataclass(kind.__name__, [(f.name, f.type)])(value)
    check_fields(made)
    return getattr(made, f.name)


@pytest.mark.parametrize("name", PATHS)
def test_every_path_is_expanded_and_none_is_left_to_a_shell(name):
    kind, f = PATHS[name]
    home, root = Path.home(), Path("~root").expanduser()
    for typed, meant in HOME.items():
        assert check_alone(kind, f, typed) == meant.format(home=home, root=root)
    for wrong in WRONG:
        with pytest.raises(ValueError, match=rf"^{kind.__name__}.{f.name} is .*; it must "):
            check_alone(kind, f, wrong)
    source = "".join(inspect.getsource(cls) for cls in kind.__mro__ if cls.__module__.startswith("vgpo"))
    assert (
        "check_fields" in source + inspect.getsource(kind.__post_init__) or "check_config" in source
    )  # and it is looked at


@pytest.mark.parametrize(
    "name", [name for name in PATHS if name.partition(".")[0] in ("Config", "ModelConfig", "PromptsConfig")]
)
def test_every_path_of_a_run_is_expanded_where_it_is_typed(name, recipe):
    section = {"Config": "", "ModelConfig": "model.", "PromptsConfig": "prompts."}[name.partition(".")[0]]
    option = section + name.partition(".")[2]

    def found(config):
        for part in option.split("."):
            config = getattr(config, part)
        return config

    tree = {option: "~/x"} if not section else {section[:-1]: {option.partition(".")[2]: "~/x"}}
    lines = [[f"--{option}", "~/x"], [f"--{option}=~/x"], recipe(yaml.safe_dump(tree))]
    for words in lines:
        if option == "name":  # of one folder
            assert refused(parse_config, words).startswith(
                f"name is '{Path.home()}/x'; it must be the name of a folder"
            )
        else:
            assert found(parse_config(words)) == f"{Path.home()}/x"
    for words in ([f"--{option}", "$DATA/x"], recipe(yaml.safe_dump(tree).replace("~/x", "$DATA/x"))):
        assert f"{option} is '$DATA/x'; it must be written out" in refused(parse_config, words)


def test_rewards_weights_are_paths(recipe):
    words = ["--reward", "PickScore", "--reward.weights", "~/pick", "--reward.processor=~/clip"]
    made = parse_config(words).reward["init_args"]
    assert (made["weights"], made["processor"]) == (f"{Path.home()}/pick", f"{Path.home()}/clip")
    assert "reward.weights is '$W'; it must be" in refused(
        parse_config, ["--reward", "PickScore", "--reward.weights", "$W"]
    )
    with pytest.raises(OSError, match=f"{Path.home()}/nowhere-at-all"):
        make_reward("PickScore", processor="~/nowhere-at-all")  # as by --reward_options


def test_paths_of_the_programs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("seed: 5\n")
    (tmp_path / "above.yaml").write_text("base: ~/mine.yaml\n")
    assert parse_config(["--recipe", "~/above.yaml"]).seed == 5 and parse_config(["--recipe=~/mine.yaml"]).seed == 5
    assert refused(train, ["--resume", "~/no-run"]) == f"error: {tmp_path}/no-run is not a run: it has no config.yaml"
    assert refused(train, ["--resume=~/no-run"]) == f"error: {tmp_path}/no-run is not a run: it has no config.yaml"
    assert refused(train, ["--resume", "$RUN"]).startswith("error: --resume is '$RUN'; it must be written out")
    given = evaluate_parser().parse_args(
        ["~/model", "--compare", "~/a", "~/b", "--lora", "~/l", "--output=~/o", "--prompts=~/p"]
    )
    assert [given.model, *given.compare, given.lora, given.output, given.prompts] == [
        f"{tmp_path}/{n}" for n in ("model", *"ablop")
    ]
    made = GenerateOptions(["a cat"], run="~/r", model="~/m", output="~/o", recipe="~/x.yaml")
    assert (made.run, made.model, made.output, made.recipe) == tuple(
        f"{tmp_path}/{n}" for n in ("r", "m", "o", "x.yaml")
    )
    assert f"{tmp_path}/no is no" in refused(generate, ["a cat", "--run", "~/no"]) or True
    prompts = importlib.import_module("vgpo.prompts.__main__")
    prompts.main(["ocr", "--count", "3", "--out", "~/three.txt"])
    assert (tmp_path / "three.txt").is_file()
    assert "out is '$X/three.txt'; it must" in refused(prompts.main, ["ocr", "--count", "3", "--out", "$X/three.txt"])
    assert not any(path.name.startswith(("~", "$")) for path in (*Path().iterdir(), *tmp_path.iterdir()))


def test_expanding_twice_is_expanding_once():
    for path in ("~/a", "owner/model", "tiny", "./~odd", "C:\\models", "module:function", "a~", "~root"):
        assert expand_path(expand_path(path)) == expand_path(path)
    assert expand_path(Path("~") / "a") == f"{Path.home()}/a"


# --- numbers, and options as they are typed ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--objective.beta -2", "objective.beta is -2; it must be a number v with v>=0"),
        ("--optim.lr -3e-5", "optim.lr is -3e-5; it must be a number v with v>0"),
        ("--optim.weight_decay -.5", "optim.weight_decay is -.5; it must be a number v with v>=0"),
        ("--optim.max_grad_norm -inf", "optim.max_grad_norm is -inf; it must be a number v with v>0"),
        ("--model.resolution None", "model.resolution must be a whole number, not None; for no value write null"),
        ("--model.resolution none", "model.resolution must be a whole number, not none; for no value write null"),
        ("--model.revision None", "ModelConfig.revision is 'None'; it must be null, or left out, for no value"),
        ("--model.embedding_cache=none", "ModelConfig.embedding_cache is 'none'; it must be null, or left out"),
        ("--model.resolution 0", "model.resolution is 0; it must be a number v with v>0"),
        ("--model.resolution 12.5", "model.resolution must be a whole number, not 12.5"),
        (f"--seed {2**63}", f"seed is {2**63}; it must be a number v with v>=0 and v<9223372036854775808"),
        (f"--seed {2**64}", f"seed is {2**64}; it must be"),
        (f"--seed {10**40}", f"seed is {10**40}; it must be"),
        ("--seed -1", "seed is -1; it must be"),
        ("--credit 3", "credit: there is no class 3; known are "),
    ],
)  # fmt: skip
def test_numbers_as_they_are_typed(words, message):
    assert refused(parse_config, words.split()).startswith(message)


def test_a_number_below_zero_belongs_to_its_option():
    words = ["--a", "-1", "--b.c", "-1e-4", "-2", "--flag", "--d=-1", "x", "-3", "--e", "-", "--f", "-nan"]
    assert joined_words(words) == ["--a=-1", "--b.c=-1e-4", "-2", "--flag", "--d=-1", "x", "-3", "--e", "-", "--f=-nan"]


def test_the_largest_seed_draws(policy):
    from vgpo.generate import seeded_noise
    from vgpo.noise import sample_noise

    seed = parse_config(["--seed", str(2**63 - 1)]).seed
    assert seed == 2**63 - 1 and EvaluateOptions(seed=seed).seed == seed
    assert seeded_noise((2,), seed, 8).isfinite().all() and sample_noise((2,), seed, 0, 1, 2).isfinite().all()
    torch.manual_seed(seed)
    for wrong in (2**63, -1, 2.5):
        for make in (lambda s: EvaluateOptions(seed=s), lambda s: GenerateOptions(["a"], run="r", seed=s)):
            with pytest.raises(ValueError, match="seed is .*; it must be a number v with"):
                make(wrong)
    assert get_args(Seed) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lr: 3e-4", "there is no option optim.lr; did you mean optim: {lr: 3e-4}?"),
        ("model.lora_rank: 8", "there is no option model.lora_rank; did you mean model: {lora_rank: 8}?"),
        ("window.size: 2", "there is no option window.size; did you mean window: {size: 2}?"),
        ("optimm.lr: 2", "there is no option optimm.lr; did you mean optim?"),
        ("credit: {class_path: GRPO, scale_rewards: batch}", "beside class_path, options stand under init_args"),
        ("sampler: [FlowSDE]", "sampler must be a class, as NAME or {class_path: NAME, init_args: {OPTION: VALUE}}"),
        ("window: {class_path: Random, init_args: 3}", "window must be a class, as NAME or {class_path"),
        ("optim: {2: 3}", "2 is no name of an option; write it as text"),
        ("model: {path: null}", "path is None; it must be text"),
    ],
)  # fmt: skip
def test_lines_of_recipes_that_are_meant_otherwise(recipe, text, message):
    assert message in refused(parse_config, recipe(text))


# --- a reward in a file ---

FILE = """
from dataclasses import dataclass
from helper_beside import half
from vgpo.rewards.base import Reward, Scores
import torch

def bright(images, prompts, metadata): return half(images.reshape(len(images), -1).mean(1) / 255)

@dataclass
class Dark(Reward):
    "Darkness."
    def __call__(self, images, prompts, metadata):
        raw = torch.as_tensor(1 - images.reshape(len(images), -1).mean(1) / 255, dtype=torch.float32)
        return Scores(raw, raw, details=[{} for _ in prompts])
"""
SMALL = [
    *("--rollout.prompts_per_epoch=2", "--rollout.group_size=2", "--rollout.num_inference_steps=3", "--window.size=2"),
    *("--credit.num_scored_steps=2", "--rollout.micro_batch_size=4", "--evaluation.num_samples=2", "--epochs=1"),
    *(
        "--evaluation.num_inference_steps=1",
        "--optim.num_minibatches=1",
        "--log_images_every=100",
        "--model.lora_rank=4",
    ),
]


@pytest.fixture
def reward_file(tmp_path):
    "A file with rewards, in a folder with a space, and one beside it that it imports."
    folder = tmp_path / "my rewards"
    folder.mkdir()
    (folder / "statistics.py").write_text(FILE)  # as a module of Python is called
    (folder / "helper_beside.py").write_text("def half(x): return x / 2\n")
    return folder / "statistics.py"


def test_a_reward_in_a_file(reward_file, tmp_path, monkeypatch, tiny_folder, capsys):
    import numpy as np

    images = np.full((2, 4, 4, 3), 255, np.uint8)
    monkeypatch.chdir(reward_file.parent)
    monkeypatch.setenv("HOME", str(tmp_path))
    for typed in (
        "./statistics.py:bright",
        "statistics.py:bright",
        "~/my rewards/statistics.py:bright",
        f"{reward_file}:bright",
    ):
        assert parse_config(["--reward", typed]).reward == f"{reward_file}:bright"
        assert make_reward(typed)(images, ["a", "b"], [{}, {}]).raw.tolist() == [0.5, 0.5]
    assert make_reward("statistics.py:Dark")(images, ["a", "b"], [{}, {}]).raw.tolist() == [0, 0]
    combined = {
        "class_path": "Combined",
        "init_args": {"rewards": {"b": "./statistics.py:bright"}, "weights": {"b": 1}},
    }
    made = parse_config(["--reward", json.dumps(combined)]).reward["init_args"]["rewards"]
    assert made == {"b": f"{reward_file}:bright"}
    import statistics

    assert not hasattr(statistics, "bright")
    train(
        [
            "--reward",
            "./statistics.py:bright",
            f"--model.path={tiny_folder}",
            f"--output_dir={tmp_path}",
            "--name=run",
            *SMALL,
            "--optim.lr_scheduler=constant",  # with which a run may be given more epochs
        ]
    )
    monkeypatch.chdir(tmp_path)
    train(["--resume=run", "--epochs=2"])  # from another folder
    assert json.loads((tmp_path / "run" / "results.json").read_text())["epochs"] == 2
    from vgpo.evaluate import main as evaluate

    evaluate(["run", "--num_samples=2", "--num_inference_steps=1"])
    evaluate(
        [
            str(tiny_folder),
            "--num_samples=2",
            "--num_inference_steps=1",
            "--rewards",
            "my rewards/statistics.py:bright",
            "JPEG",
        ]
    )
    assert "statistics.py:bright" in capsys.readouterr().out


def test_a_reward_in_a_file_for_two_processes(reward_file, tmp_path, tiny_folder):
    from faults import Driven

    run = Driven(tiny_folder, tmp_path, f"--reward={reward_file}:bright", "--epochs=1", processes=2)
    codes, said = run.start()
    assert codes == [0, 0], said
    assert run.outcome()["reward in metrics.jsonl"][0] > 0


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def g(): pass", "no attribute 'f'"),
        ("def f(:", "SyntaxError"),
        ("import no_such_library_anywhere", "No module named 'no_such_library_anywhere'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("f = 3", "is a int, not a function"),
        (None, "No such file"),
    ],
)
def test_a_file_without_a_reward(tmp_path, code, message):
    if code is not None:
        (tmp_path / "rw.py").write_text(code)
    assert message in refused(make_reward, f"{tmp_path}/rw.py:f")
    left = [module for module in sys.modules.values() if getattr(module, "__file__", None) == f"{tmp_path}/rw.py"]
    assert len(left) == (code in ("def g(): pass", "f = 3"))  # one that failed is not taken for one that was run


def test_prompts_in_a_file(tmp_path):
    (tmp_path / "rows.py").write_text("def two(split, count=None): return [{'prompt': split}] * 2\n")
    from vgpo.prompts.files import load_prompts

    assert [row["prompt"] for row in load_prompts(f"{tmp_path}/rows.py:two", "test")] == ["test", "test"]
    assert import_name(f"{tmp_path}/rows.py:two", "prompts")("train")[0] == {"prompt": "train"}


# --- bytes that are no text, and terminals that are small ---


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("raw", [b"--output=caf\xe9", b"\xff\xfe", b"--reward=\xc3("])
def test_an_argument_that_is_no_text(name, raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    word = os.fsdecode(raw)
    line = refused(importlib.import_module(PROGRAMS[name][0]).main, ["tiny", word] if name == "evaluate" else [word])
    assert (
        line
        == f"error: {word!r} on the command line is not UTF-8; rename what it names, or mend the terminal's encoding"
    )
    assert line.isascii() and not list(tmp_path.iterdir())


def terminal(monkeypatch, encoding):
    "A terminal of another encoding; the bytes that it gets are returned by a call."
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="strict", write_through=True))
    return lambda: raw.getvalue().decode(encoding)


@pytest.mark.parametrize(("encoding", "sign"), [("ascii", "+-"), ("cp437", "±"), ("latin-1", "±"), ("utf-8", "±")])
def test_a_table_on_a_small_terminal(trained, tmp_path, monkeypatch, encoding, sign):
    from vgpo.evaluate import main as evaluate

    said = terminal(monkeypatch, encoding)
    output = tmp_path / "prüfung 漢"
    evaluate([str(trained[0]), "--num_samples=4", "--num_inference_steps=1", "--rewards", "JPEG", f"--output={output}"])
    assert sign in said() and "JPEG" in said()
    assert "±" in (output / "table.md").read_text(encoding="utf-8") and (output / "results.json").is_file()


def test_results_are_written_before_they_are_shown(trained, tmp_path, monkeypatch):
    from vgpo.evaluate import main as evaluate

    def gone(*words, **options):
        raise OSError("the terminal is gone")

    monkeypatch.setattr("builtins.print", gone)
    words = [
        str(trained[0]),
        "--num_samples=4",
        "--num_inference_steps=1",
        "--rewards",
        "JPEG",
        f"--output={tmp_path / 'o'}",
    ]
    assert refused(evaluate, words) == "error: the terminal is gone"
    assert json.loads((tmp_path / "o" / "results.json").read_text())["metrics"]


def test_names_of_files_on_a_small_terminal(trained, tmp_path, monkeypatch):
    said = terminal(monkeypatch, "ascii")
    generate(["ein Hörnchen", "--run", str(trained[0]), f"--output={tmp_path / 'ö → ∞'}", "--num_inference_steps=1"])
    assert "\\xf6 -> \\u221e" in said() and len(list((tmp_path / "ö → ∞").glob("*.png"))) == 2


ASCII, C = {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (ASCII, "plan --recipe tiny-geneval"),
        (ASCII, "prompts ocr --count 2 --out grün.txt"),
        (C, "prompts ocr --count 2 --out grün.txt"),
        (C, "train --name a–b/±"),
    ],
)
def test_programs_on_a_small_terminal(environment, words, tmp_path):
    root, words = Path(__file__).parents[1], words.split()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))} | environment
    environment |= {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-m", "vgpo", *words], env=environment, cwd=tmp_path, capture_output=True)
    assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
    wrong = words[1] == "--name" or (
        "grün.txt" in words and "LC_ALL" in environment
    )  # no file of this name can be made there
    assert done.returncode == wrong, done.stderr
    if wrong:
        assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1


# --- the life of a run ---


@pytest.mark.parametrize("name", ["with space", "it's; rm x", "{0} {epoch}"])
def test_the_way_on_can_be_pasted_into_a_shell(name, tmp_path, monkeypatch, capsys):
    class Ended:
        folder, main, saved = tmp_path / name, True, 3

        def run(self):
            raise OSError("no space left")

    monkeypatch.setattr(program, "stoppable", lambda session: __import__("contextlib").nullcontext())
    with pytest.raises(SystemExit) as end:
        program.see_through(Ended())
    words = shlex.split(str(end.value).partition("with: ")[2])
    assert words == ["python", "-m", "vgpo.train", "--resume", str(tmp_path / name)]
    assert "make room, then go on from epoch 3" in str(end.value)


@pytest.mark.parametrize(
    "more", [["--optim.lr=0.5"], ["--seed=3", "--epochs=9"], ["--epochs=0"], ["--credit.gamma=0.1"]]
)
def test_a_refused_resume_changes_nothing(tmp_path, more):
    config = Config(output_dir=str(tmp_path), name="run")
    save_config(config, tmp_path / "config.yaml")
    for epoch in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", {"w": torch.zeros(2)}, {"epoch": epoch, "recipe": config.recipe()}, 3)
    (tmp_path / "checkpoints" / "epoch-00002" / "state.safetensors").write_bytes(b"cut")
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    line = refused(train, ["--resume", str(tmp_path), *more])
    assert "not that of the checkpoint" in line or "has 1 epochs already" in line
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names
    path, damaged = sift(tmp_path / "checkpoints")
    assert path.name == "epoch-00001" and [bad.name for bad in damaged] == ["epoch-00002"]


def test_every_recipe_that_is_there_has_each_key_once():
    for path in (Path(vgpo.__file__).parent / "recipes").glob("*.yaml"):
        assert recipe_files(path.stem)
