"""What is kept is tied to what it came from: the cache of embeds, an evaluation's folder, a run's checkpoint.

One number is changed in one part of a model, and each of the three is asked whether it still holds.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

import vgpo.files
import vgpo.train as program
from vgpo.evaluate import main as evaluate
from vgpo.files import digest, remembered_sha256
from vgpo.policies.base import load_policy
from vgpo.policies.loading import ModelConfig, load_pipeline, model_digests
from vgpo.world.pretrain import make_autoencoder

TEXTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
PARTS = (*TEXTS, "transformer", "vae", "scheduler", "tiny_vae")
SMALL = [
    *("--epochs=1", "--save_every=1", "--model.lora_rank=2", "--reward=tiny_rewards:brightness"),
    *("--optim.lr_scheduler=constant", "--rollout.prompts_per_epoch=1", "--rollout.group_size=2"),
    *("--rollout.num_inference_steps=2", "--window.size=1", "--credit.num_scored_steps=1", "--optim.num_minibatches=1"),
    *("--evaluation.num_samples=1", "--evaluation.num_inference_steps=1"),
]
EVALUATE = ["--reward", "tiny_rewards:brightness", "--num_samples=2", "--num_inference_steps=1"]


def changed(place):
    "Change one number in the folder of a part, keeping sizes of weights and all dates."
    weights = [file for file in place.glob("*.safetensors") if "fp16" not in file.name]
    file = [*weights, *place.glob("scheduler_config.json"), *place.glob("tokenizer.json")][0]
    dates = file.stat()
    if weights:
        content = bytearray(file.read_bytes())
        content[-4] ^= 1  # the last digit of the last number
        file.write_bytes(content)
    else:
        content = json.loads(file.read_text())
        if "shift" in content:
            content["shift"] += 0.5
        else:
            vocabulary = content["model"]["vocab"]
            first, second = list(vocabulary)[-2:]
            vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        file.write_text(json.dumps(content))
    os.utime(file, ns=(dates.st_atime_ns, dates.st_mtime_ns))


@pytest.fixture(scope="module")
def origin(tiny_folder, tmp_path_factory):
    "A folder with a model, a tiny VAE in it, a run of both after its only epoch, and an evaluation."
    root = tmp_path_factory.mktemp("origin")
    shutil.copytree(tiny_folder, root / "model")
    torch.manual_seed(1)
    make_autoencoder().save_pretrained(root / "model" / "tiny_vae")
    program.main([*SMALL, *paths(root / "model"), f"--output_dir={root}", "--name=run"])
    evaluate([str(root / "model"), *EVALUATE, "--output", str(root / "images")])
    return root


@pytest.fixture
def root(origin, tmp_path):
    "A copy of it, in another place."
    return Path(shutil.copytree(origin, tmp_path / "root"))


def paths(model):
    return [f"--model.path={model}", f"--model.tiny_vae={model / 'tiny_vae'}"]


def embeds_file(model, cache, **options):
    "The file of the cache that a prompt's embeds are in."
    policy = load_policy(
        ModelConfig(str(model), embedding_cache=str(cache), tiny_vae=str(model / "tiny_vae"), **options)
    )
    policy.encode(["a photo of a red circle"])
    return policy.encoder.disk.file("a photo of a red circle")


def refusal(f, *args):
    "The one line with which a program refuses; None if it does not."
    try:
        f(*args)
    except SystemExit as stop:
        assert str(stop).startswith("error: ") and "\n" not in str(stop)
        return str(stop)


@pytest.mark.parametrize("part", PARTS)
def test_a_number_that_changed_is_noticed_by_whatever_depends_on_it(root, capsys, part):
    model = root / "model"
    kept = embeds_file(model, root / "cache")
    changed(model / part)
    assert (embeds_file(model, root / "cache") != kept) == (part in TEXTS)
    said = refusal(evaluate, [str(model), *EVALUATE, "--output", str(root / "images")])
    if part == "tiny_vae":  # no finished image is decoded by it
        assert said is None
    else:
        assert f"holds an evaluation with other settings: model.{part} is " in said and said.count(" is ") == 1
    said = refusal(program.main, ["--resume", str(root / "run"), *paths(model), "--epochs=2"])
    assert f"the model is not that of the checkpoint, it differs in {part} (digest " in said
    assert said.count(" (digest ") == 1
    assert len((root / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert str(root) not in (root / "run" / "config.yaml").read_text()  # which a refusal leaves as it was


@pytest.mark.parametrize("way", ["copied", "a link", "relative", "with a variant"])
def test_what_only_moved_is_what_it_was(root, monkeypatch, way):
    model, images = root / "model", {path: path.stat().st_mtime_ns for path in (root / "images").rglob("*.png")}
    kept = embeds_file(model, root / "cache")
    if way == "copied":
        model = Path(shutil.copytree(model, root / "elsewhere"))
    if way == "a link":
        (root / "elsewhere").symlink_to(model)
        model = root / "elsewhere"
    if way == "relative":
        monkeypatch.chdir(root)
        model = Path("model")
    if way == "with a variant":  # which another program has put there
        for part in ("transformer", "text_encoder"):
            for file in (model / part).glob("*.safetensors"):
                shutil.copy(file, file.with_suffix(".fp16.safetensors"))
        (model / "README.md").write_text("A model.")
    assert embeds_file(model, root / "cache") == kept and len(list((root / "cache").iterdir())) == 1
    assert refusal(evaluate, [str(model), *EVALUATE, "--output", str(root / "images")]) is None
    assert images == {path: path.stat().st_mtime_ns for path in (root / "images").rglob("*.png")}
    assert refusal(program.main, ["--resume", str(root / "run"), *paths(model), "--epochs=2"]) is None
    assert len((root / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_tiny_vae_that_comes_or_goes_is_another_run(root):
    model = root / "model"
    words = ["--resume", str(root / "run"), f"--model.path={model}", "--model.tiny_vae=null", "--epochs=2"]
    said = refusal(program.main, words)
    assert "it differs in tiny_vae (digest " in said and "now None" in said


def test_several_parts_are_all_named(root):
    for part in ("vae", "text_encoder_2", "scheduler"):
        changed(root / "model" / part)
    said = refusal(program.main, ["--resume", str(root / "run"), *paths(root / "model")])
    assert all(f"{part} (digest " in said for part in ("vae", "text_encoder_2", "scheduler"))


def test_a_run_without_a_checkpoint_measures_the_new_model_anew(root):
    shutil.rmtree(root / "run" / "checkpoints")
    before = (root / "run" / "before" / "settings.json").read_text()
    changed(root / "model" / "vae")
    assert refusal(program.main, ["--resume", str(root / "run"), *paths(root / "model")]) is None
    now = json.loads((root / "run" / "before" / "settings.json").read_text())
    differs = {part for part, found in json.loads(before)["model"].items() if now["model"][part] != found}
    assert differs == {"vae"}


# --- a LoRA ---


def adapt(folder, *parts):
    "Save a random LoRA for some parts of the model as diffusers does."
    pipe, layers = load_pipeline(folder / "model"), {}
    for part in parts:
        network, targets = getattr(pipe, part), ["attn.to_q"] if part == "transformer" else ["q_proj"]
        network.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(network)
    pipe.save_lora_weights(folder / "lora", **layers)
    return folder / "lora"


def test_another_lora_is_another_evaluation_and_a_moved_one_is_not(root):
    lora = adapt(root, "transformer")
    words = [str(root / "model"), *EVALUATE, "--output", str(root / "adapted"), "--lora"]
    for folder in (lora, shutil.copytree(lora, root / "moved")):
        assert refusal(evaluate, [*words, str(folder)]) is None
    changed(lora)
    assert "trained is " in refusal(evaluate, [*words, str(lora)])
    assert digest(root / "moved") == digest(root / "moved" / "pytorch_lora_weights.safetensors") != digest(lora)


def test_a_lora_has_no_say_in_embeds(root):
    options = ModelConfig(str(root / "model"), embedding_cache=str(root / "cache"))
    plain, again = load_policy(options), load_policy(options)
    again.load(adapt(root, "transformer"))
    assert again.encoder.disk.file("red") == plain.encoder.disk.file("red")
    with pytest.raises(ValueError, match="text_encoder.* is unknown"):  # one of a text encoder would have one
        plain.load(adapt(root, "transformer", "text_encoder"))


# --- large files ---


@pytest.fixture
def large(tmp_path, monkeypatch):
    "A file that counts as large and is not new, and a list of the files that were read."
    read, real = [], vgpo.files.sha256
    monkeypatch.setattr(vgpo.files, "LARGE", 1000)
    monkeypatch.setattr(vgpo.files, "sha256", lambda path: read.append(path) or real(path))
    now = time.time()
    monkeypatch.setattr(vgpo.files.time, "time", lambda: now + 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "large").write_bytes(random.Random(0).randbytes(100_000))
    return tmp_path / "large", read


def truth(path):
    return sha256(path.read_bytes()).hexdigest()


def test_a_large_file_is_read_once(large):
    path, read = large
    assert [remembered_sha256(path) for _ in range(3)] == [truth(path)] * 3 and len(read) == 1
    link = path.with_name("link")
    link.symlink_to(path)
    assert remembered_sha256(link) == truth(path) and len(read) == 1
    assert remembered_sha256(path.rename(path.with_name("moved"))) == truth(path.with_name("moved")) and len(read) == 2


@pytest.mark.parametrize("seed", range(5))
def test_whatever_bit_of_it_is_changed_is_seen(large, seed):
    "At any place, with the size and the date that it had."
    path, _ = large
    before, dates, chance = remembered_sha256(path), path.stat(), random.Random(seed)
    with open(path, "r+b") as file:
        place = chance.randrange(100_000)
        file.seek(place)
        byte = file.read(1)[0] ^ 1 << chance.randrange(8)
        file.seek(place)
        file.write(bytes([byte]))
    os.utime(path, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    assert remembered_sha256(path) == truth(path) != before


def test_another_file_of_the_same_date_and_size_in_its_place_is_seen(large):
    path, _ = large
    before, dates = remembered_sha256(path), path.stat()
    other = path.with_name("other")
    other.write_bytes(bytes(100_000))
    os.utime(other, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    other.replace(path)
    assert remembered_sha256(path) == truth(path) != before


def test_a_file_that_was_just_written_is_not_remembered(large, monkeypatch):
    path, read = large
    now = path.stat().st_ctime
    monkeypatch.setattr(vgpo.files.time, "time", lambda: now + 1)
    assert [remembered_sha256(path) for _ in range(2)] == [truth(path)] * 2 and len(read) == 2


def test_a_home_that_cannot_be_written_to_costs_time_alone(large, monkeypatch):
    path, read = large
    path.with_name("file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(path.with_name("file")))
    assert [remembered_sha256(path) for _ in range(2)] == [truth(path)] * 2 and len(read) == 2


# --- the hub ---


def test_a_model_of_the_hub_has_the_digests_of_its_copy_in_a_folder(tiny_folder, tmp_path):
    "Out of a cache as the hub's client lays it out, without a network."
    cache = tmp_path / "hub" / "models--owner--name"
    for path in (path for path in Path(tiny_folder).rglob("*") if path.is_file()):
        blob = cache / "blobs" / truth(path)
        link = cache / "snapshots" / ("0" * 40) / path.relative_to(tiny_folder)
        for folder in (blob.parent, link.parent):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    code = (
        "import json; from vgpo.policies.loading import *; print(json.dumps(model_digests(ModelConfig('owner/name'))))"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == model_digests(ModelConfig(str(tiny_folder)))


@pytest.mark.parametrize("lost", ["vae", "tokenizer_2", "scheduler"])
def test_a_part_that_is_not_there_is_named(root, lost):
    shutil.rmtree(root / "model" / lost)
    with pytest.raises(OSError, match=f"cannot load the pipeline .*, check model.path: .*{lost}") as error:
        model_digests(ModelConfig(str(root / "model")))
    assert "\n" not in str(error.value)


def test_weights_that_are_found_are_those_of_the_model(tiny_folder):
    "An independent look: the digests are of files that hold the tensors that a pipeline has."
    pipe, index = load_pipeline(tiny_folder), json.loads((Path(tiny_folder) / "model_index.json").read_text())
    assert {name for name, part in index.items() if isinstance(part, list) and part[0]} | {"model_index.json"} == set(
        model_digests(ModelConfig(str(tiny_folder)))
    )
    for part in ("transformer", "vae"):
        files = [f for f in vgpo.files.loaded_files(Path(tiny_folder) / part) if f.suffix == ".safetensors"]
        assert {key for file in files for key in load_file(file)} == set(getattr(pipe, part).state_dict())
