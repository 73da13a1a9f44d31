"Every part of a pipeline is loaded as a whole, or one line names the part and what is wrong with it."

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_flux, tiny_qwen_image, tiny_sd3, tiny_z_image
from torch.testing import assert_close

from vgpo.policies.base import load_policy
from vgpo.policies.loading import ModelConfig, load_pipeline, networks
from vgpo.world.pretrain import make_autoencoder

MAKERS = {"sd3": tiny_sd3, "flux": tiny_flux, "qwen-image": tiny_qwen_image, "z-image": tiny_z_image}
PARTS = ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "{family: folder of a whole pipeline}."
    found = {name: tmp_path_factory.mktemp(name) for name in MAKERS}
    for name, folder in found.items():
        MAKERS[name]().save_pretrained(folder)
    return found


@pytest.fixture
def copy(folders, tmp_path):
    return lambda family: shutil.copytree(folders[family], tmp_path / "pipeline", dirs_exist_ok=True)


def change(folder, what):
    "Change the tensors of a part, a dict, by a function."
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    what(tensors)
    save_file(tensors, file, {"format": "pt"})


def refused(folder, *words, option="check model.path"):
    with pytest.raises(OSError) as error:
        load_policy(ModelConfig(str(folder)))
    text = str(error.value)
    assert text.startswith("cannot load the pipeline ") and option in text and "\n" not in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("family", MAKERS)
def test_a_whole_pipeline_is_that_of_plain_diffusers(folders, family):
    theirs = diffusers.DiffusionPipeline.from_pretrained(folders[family], dtype=torch.bfloat16)
    ours = load_pipeline(folders[family], torch.bfloat16)
    assert networks(ours).keys() == networks(theirs).keys() and ours.components.keys() == theirs.components.keys()
    for name, part in networks(theirs).items():
        mine = networks(ours)[name].state_dict()
        assert mine.keys() == part.state_dict().keys()
        assert all(torch.equal(mine[k], v) and mine[k].dtype == v.dtype for k, v in part.state_dict().items())


CHANGES = {
    "lacks one": lambda t: t.pop(sorted(t)[-1]),
    "lacks a block": lambda t: [t.pop(name) for name in sorted(t)[len(t) // 2 :]],
    "has a prefix": lambda t: [t.update({f"module.{name}": t.pop(name)}) for name in [*t]],
    "has one too many": lambda t: t.update({"layers.99.weight": torch.ones(2)}),
    "has another shape": lambda t: t.update({sorted(t)[-1]: torch.ones(3, 1, 2)}),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", CHANGES)
def test_weights_that_are_not_whole_are_named_with_their_part(copy, part, how):
    folder = copy("sd3")
    names = sorted(load_file(next((folder / part).glob("*.safetensors"))))
    change(folder / part, CHANGES[how])
    said = {
        "lacks one": f"{names[-1]} is missing",
        "lacks a block": "is missing (and",
        "has a prefix": "is unknown (and",
        "has one too many": "layers.99.weight is unknown",
        "has another shape": names[-1],
    }
    if part != "text_encoder_3" or how != "lacks one":  # whose last tensor may be tied to another
        refused(folder, f"{part}: ", said[how])


@pytest.mark.parametrize("family", ["flux", "qwen-image", "z-image"])
def test_the_text_encoders_of_every_family(copy, family):
    folder = copy(family)
    change(folder / "text_encoder", CHANGES["has a prefix"])
    refused(folder, "text_encoder: weights", "is missing", "is unknown")


def test_a_text_encoder_may_be_half_of_a_file(copy, folders):
    "As published ones are: the other tower, or the head, is of no use and not missed."
    folder = copy("sd3")
    change(folder / "text_encoder", lambda t: t.update({"vision_model.x": torch.ones(1), "logit_scale": torch.ones(1)}))
    change(
        folder / "text_encoder_3",
        lambda t: t.update({"decoder.final_layer_norm.weight": torch.ones(1), "lm_head.weight": torch.ones(1)}),
    )
    ours, whole = (networks(load_pipeline(f)) for f in (folder, folders["sd3"]))
    for name, part in whole.items():
        assert_close(ours[name].state_dict(), part.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize(("part", "key", "value"), [
    ("transformer", "num_layers", 2), ("text_encoder", "num_hidden_layers", 2), ("text_encoder_3", "num_layers", 3),
    ("vae", "latent_channels", 8), ("transformer", "in_channels", 16), ("text_encoder_2", "hidden_size", 32),
    ("text_encoder", "num_attention_heads", -1), ("text_encoder_3", "relative_attention_max_distance", -1),
    ("vae", "norm_num_groups", -1),
])  # fmt: skip
def test_a_configuration_of_another_model(copy, part, key, value):
    folder = copy("sd3")
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    refused(folder, f"{part}: ")


@pytest.mark.parametrize("how", ["lacks one", "has a prefix", "has one too many"])
def test_a_tiny_vae_that_is_not_whole(folders, tmp_path, how):
    make_autoencoder(latent_channels=4).save_pretrained(tmp_path)
    change(tmp_path, CHANGES[how])
    with pytest.raises(OSError, match="check model.tiny_vae: weights .* do not fit the model: .* (missing|unknown)"):
        load_policy(ModelConfig(str(folders["sd3"]), tiny_vae=str(tmp_path)))


@pytest.mark.parametrize("how", ["lacks one", "has a prefix", "has one too many"])
def test_trained_weights_that_are_not_whole(folders, tmp_path, how):
    policy = load_policy(ModelConfig(str(folders["sd3"]), lora_rank=0))
    policy.full_finetune()
    policy.save(tmp_path)
    change(tmp_path, CHANGES[how])
    with pytest.raises(OSError, match="do not fit the model: .* (missing|unknown)") as error:
        policy.load(tmp_path)
    assert "\n" not in str(error.value)
    tiny_sd3(num_layers=2).transformer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="blocks.1.* is missing .*give the base model that they were trained on"):
        policy.load(tmp_path)


def test_tokenizers(copy, folders):
    folder = copy("sd3")
    (folder / "tokenizer_2" / "tokenizer.json").unlink()  # the library makes one that knows two words
    refused(folder, "tokenizer_2 knows 2 tokens, and text_encoder_2 ", "copy them again")
    folder = copy("sd3")
    shutil.copy(folders["qwen-image"] / "tokenizer" / "tokenizer.json", folder / "tokenizer" / "tokenizer.json")
    refused(folder, "tokenizer knows ", "another model's")


@pytest.mark.parametrize(("key", "value", "said"), [
    ("model_max_length", None, "has no model_max_length"), ("model_max_length", -1, "damaged"), ("pad_token", None, "damaged"),
    ("model_max_length", 1.5, "damaged"), ("model_max_length", "no", "damaged"),
])  # fmt: skip
def test_a_tokenizer_that_cannot_pad(copy, key, value, said):
    folder = copy("sd3")
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    refused(folder, "tokenizer", said)


def test_parts_that_are_absent(copy):
    folder = copy("sd3")
    index = json.loads((folder / "model_index.json").read_text())
    for name, value in (
        ("vae", [None, None]),
        ("transformer", ["diffusers", "NoSuchClass"]),
        ("text_encoder", ["torch", "load"]),
        ("scheduler", [None, None]),
    ):
        (folder / "model_index.json").write_text(json.dumps(index | {name: value}))
        refused(folder, name)
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "vae"}))
    refused(folder, "vae")


# anything

FILES = [f"{part}/{name}" for part in PARTS for name in ("config.json", "*.safetensors")]
FILES += [f"tokenizer{n}/{name}" for n in ("", "_2", "_3") for name in ("tokenizer.json", "tokenizer_config.json")]
FILES += ["model_index.json", "scheduler/scheduler_config.json"]
VALUES = st.sampled_from([-1, 0, 2, 7, 1.5, None, "no", True, [], [3], {}])


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(file=st.sampled_from(FILES), how=st.sampled_from(["delete", "truncate", "rename", "empty", "value", "value"]),
       part=st.floats(0, 1), value=VALUES)  # fmt: skip
def test_whatever_a_folder_holds_it_draws_or_one_line_says_why_not(folders, tmp_path, file, how, part, value):
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders["sd3"], folder)
    (path,) = folder.glob(file)
    content = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "rename":
        path.rename(path.with_name(f"old-{path.name}.bak"))
    elif how in ("truncate", "empty"):
        path.write_bytes(content[: int(0.9 * part * len(content)) if how == "truncate" else 0])
    elif path.suffix == ".json":
        data = json.loads(content)
        key = sorted(data)[int(part * (len(data) - 1))]
        path.write_text(json.dumps(data | {key: value}))
    try:
        policy = load_policy(ModelConfig(str(folder), resolution=16, max_sequence_length=4))
    except (OSError, ValueError) as error:
        text = str(error)
        assert "\n" not in text and len(text) < 900 and (str(folder) in text or "scheduler" in text or "model." in text)
    else:
        assert how == "value"
        with torch.no_grad():
            noise = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
            velocity = policy.velocity(noise, torch.tensor(0.5), policy.encode(["a photo of two red circles"]))
            assert velocity.shape == noise.shape and policy.decode(velocity).dtype == np.uint8
