"A LoRA is used as a whole, as plain diffusers uses it, or refused with the first tensors that do not fit."

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_flux, tiny_sd3

from vgpo.open_run import open_policy, read_model
from vgpo.policies.base import load_policy
from vgpo.policies.loading import ModelConfig, load_pipeline
from vgpo.policies.lora import load_lora, lora_file

FIT = "give the base model that it was trained on"
TARGETS = ["attn.to_q", "attn.to_k", "attn.add_v_proj"]


def values(network):
    "The adapters of a transformer by name, without the names of their sets."
    return {
        name.replace(".default_0", "").replace(".default", ""): p.detach().clone()
        for name, p in network.named_parameters()
        if ".lora_" in name
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    "The folder of a pipeline with three blocks."
    folder = tmp_path_factory.mktemp("sd3")
    tiny_sd3().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(sd3, tmp_path_factory):
    "The file of a random LoRA for it."
    policy, folder = load_policy(ModelConfig(str(sd3))), tmp_path_factory.mktemp("lora")
    policy.add_lora(rank=2, alpha=6, targets=TARGETS)
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    policy.save(folder)
    return lora_file(folder)


@pytest.fixture(scope="module")
def pipe(sd3):
    return load_pipeline(sd3)


@pytest.fixture
def bare(pipe):
    "A pipeline whose transformer loses its LoRA after the test."
    yield pipe
    pipe.unload_lora_weights()


def written(tensors, path, metadata=None):
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def metadata_of(file):
    with safe_open(file, "pt") as f:
        return f.metadata()


# what loads


def test_a_file_and_its_folder_load_as_in_plain_diffusers(sd3, source, bare):
    bare.load_lora_weights(source)
    theirs = values(bare.transformer)
    scaling = {layer.scaling["default_0"] for layer in bare.transformer.modules() if hasattr(layer, "scaling")}
    for path in (source, source.parent):
        policy = open_policy(*read_model(str(sd3), lora=str(path)))
        assert same(values(policy.network), theirs) and len(theirs) == 2 * 9 and not policy.parameters()
        ours = {layer.scaling["default_0"] for layer in policy.network.modules() if hasattr(layer, "scaling")}
        assert ours == scaling == {3.0}


@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"attn.to_q": 3}}, {"use_rslora": True}])
def test_pefts_own_form(sd3, bare, tmp_path, options):
    "As Flow-GRPO writes it: the velocity is that of the PEFT model that was saved."
    network = load_pipeline(sd3).transformer
    config = LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False, **options)
    model = get_peft_model(network, config)
    model.save_pretrained(tmp_path)
    load_lora(bare, tmp_path)
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 7, 32, generator=g), torch.randn(2, 32, generator=g)
    with torch.no_grad():
        wanted, found = (
            n(*inputs, torch.tensor([500.0, 20.0]), return_dict=False)[0] for n in (model, bare.transformer)
        )
        with model.disable_adapter():
            base = model(*inputs, torch.tensor([500.0, 20.0]), return_dict=False)[0]
    assert torch.equal(wanted, found) and (wanted - base).abs().max() > 1e-3
    bare.unload_lora_weights()
    for damage, message in (
        (lambda f: f.unlink(), "without the adapter_config.json beside it"),
        (lambda f: f.write_text("{"), "cannot load the LoRA"),
        (lambda f: f.write_text(json.dumps(json.loads(f.read_text()) | {"r": 5})), r"is \(.*\), not \("),
        (lambda f: f.write_text(json.dumps(json.loads(f.read_text()) | {"peft_type": "LOHA"})), "is of a LOHA"),
    ):
        folder = shutil.copytree(tmp_path, tmp_path / "damaged", dirs_exist_ok=True)
        damage(folder / "adapter_config.json")
        with pytest.raises(ValueError, match=message) as error:
            load_lora(bare, folder)
        assert "\n" not in str(error.value) and not getattr(bare.transformer, "peft_config", None)


def test_a_file_without_settings_loads_with_a_scale_of_one(source, bare, tmp_path):
    "As many programs write it; which is what plain diffusers makes of it."
    load_lora(bare, written(load_file(source), tmp_path / "bare.safetensors"))
    found = values(bare.transformer)
    bare.unload_lora_weights()
    bare.load_lora_weights(tmp_path)
    assert same(found, values(bare.transformer)) and found


def kohya(rank=2):
    "A LoRA for two layers of the tiny FLUX as sd-scripts names them."
    g, width = torch.Generator().manual_seed(0), 32
    layers = ("double_blocks_0_img_attn_proj", "single_blocks_1_modulation_lin", "double_blocks_1_txt_attn_proj")
    found = {}
    for layer in layers:
        out = 3 * width if "modulation" in layer else width
        found[f"lora_unet_{layer}.lora_down.weight"] = torch.randn(rank, width, generator=g)
        found[f"lora_unet_{layer}.lora_up.weight"] = torch.randn(out, rank, generator=g)
        found[f"lora_unet_{layer}.alpha"] = torch.tensor(1.0)
    return found


def test_kohyas_form_where_diffusers_converts_it(source, bare, tmp_path):
    file, flux = written(kohya(), tmp_path / "kohya.safetensors"), tiny_flux()
    load_lora(flux, file)
    found = values(flux.transformer)
    flux.unload_lora_weights()
    flux.load_lora_weights(file)
    assert same(found, values(flux.transformer)) and len(found) == 6
    flux.unload_lora_weights()
    stray = kohya() | {"lora_unet_nothing_known.lora_down.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match="cannot load the LoRA .*nothing_known.*kohya's form"):
        load_lora(flux, written(stray, tmp_path / "stray.safetensors"))
    with pytest.raises(ValueError, match="kohya's form, which is not converted for a StableDiffusion3Pipeline"):
        load_lora(bare, file)


# what does not


@pytest.mark.parametrize("blocks", [2, 4])
def test_a_model_of_another_depth(source, blocks):
    "Of more blocks the LoRA would adapt some; of fewer it has too many."
    other = tiny_sd3(num_layers=blocks)
    with pytest.raises(ValueError, match=f"blocks.{min(blocks, 3)}.*(missing|unknown).*; {FIT}"):
        load_lora(other, source)
    assert not getattr(other.transformer, "peft_config", None)


FIRST = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop(FIRST), f"{FIRST} is missing; {FIT}"),
    (lambda t: t.pop(FIRST.replace("lora_A", "lora_B")), "attn.to_q.lora_B.weight is missing; "),
    (lambda t: [t.pop(n) for n in [*t] if "lora_B" in n], r"lora_B.weight is missing \(and 8 more\); "),
    (lambda t: t.update({FIRST + "s": torch.ones(1)}), f"{FIRST}s is unknown; "),
    (lambda t: t.update({FIRST: t[FIRST][:, 1:]}), r"is \(2, 31\), not \(2, 32\); "),
    (lambda t: t.update({FIRST.replace("lora_A.weight", "alpha"): torch.ones(1)}) or t.pop(FIRST), "is missing"),
    (lambda t: t.update({"text_encoder.a.lora_A.weight": torch.ones(1, 1)}), "looks like a LoRA of a text encoder"),
    (lambda t: t.update({FIRST.replace("lora_A.weight", "dora_scale"): torch.ones(1)}), "cannot load .*DoRA"),
    (lambda t: t.update({n.replace("lora_A", "hada_w1_a"): t.pop(n) for n in [*t]}), "a LoHa of LyCORIS, which"),
    (lambda t: t.clear() or t.update(x=torch.ones(1)), "x is unknown"),
])  # fmt: skip
@pytest.mark.parametrize("with_settings", [True, False])
def test_tensors_that_do_not_fit_are_named(source, bare, tmp_path, change, message, with_settings):
    tensors = load_file(source)
    change(tensors)
    file = written(tensors, tmp_path / "changed.safetensors", metadata_of(source) if with_settings else None)
    with pytest.raises(ValueError, match=message) as error:
        load_lora(bare, file)
    assert "\n" not in str(error.value) and "changed.safetensors" in str(error.value)
    assert not getattr(bare.transformer, "peft_config", None)


def test_of_several_files_none_is_taken(source, bare, tmp_path):
    names = ["pytorch_lora_weights.safetensors", "adapter_model.safetensors", "step-100.safetensors"]
    for name in names:
        shutil.copy(source, tmp_path / name)
    with pytest.raises(ValueError, match=f"several LoRA files, {', '.join(sorted(names))}; give one of them"):
        read_model("tiny", lora=str(tmp_path))
    for name in names:
        assert read_model("tiny", lora=str(tmp_path / name))[1] == tmp_path / name
    (tmp_path / "weights.pt").write_bytes(b"a pickle")
    with pytest.raises(FileNotFoundError, match="weights.pt is neither a .safetensors file nor a folder with one"):
        read_model("tiny", lora=str(tmp_path / "weights.pt"))


@pytest.mark.parametrize(("target", "kind"), [
    ("attn.norm_q", "RMSNorm"), ("norm2", "LayerNorm"), ("attn", "Attention"),
    ("transformer_blocks.1.ff", "FeedForward"),
])  # fmt: skip
def test_targets_without_the_form_of_a_lora(sd3, target, kind):
    policy = load_policy(ModelConfig(str(sd3)))
    with pytest.raises(ValueError, match=f"model.lora_targets has '{target}', but .* is a {kind}, which has no matrix"):
        policy.add_lora(rank=2, targets=["attn.to_q", target])
    assert not policy.parameters() or not any(".lora_" in name for name, _ in policy.network.named_parameters())


# anything


def renamed(name, how):
    return {
        "prefix": f"model.{name}",
        "block": name.replace("blocks.0", "blocks.7"),
        "half": name.replace("lora_A", "lora_C"),
        "bare": name.removeprefix("transformer."),
        "peft": name.replace("transformer.", "base_model.model.", 1),
    }[how]


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["drop", "prefix", "block", "half", "bare", "peft", "extra", "shape"]), st.integers(0, 15)
    ),
    max_size=3,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=CHANGES, with_settings=st.booleans())
def test_whatever_a_lora_holds_all_of_it_is_used_or_one_line_says_why_not(
    source, pipe, tmp_path, changes, with_settings
):
    tensors = load_file(source)
    names = sorted(tensors)
    for how, i in changes:
        name = names[i]
        if name not in tensors:
            continue
        if how == "shape":
            tensors[name] = tensors[name][:-1]
        elif how == "extra":
            tensors[f"{name}.more"] = torch.ones(1)
        else:
            tensor = tensors.pop(name)
            if how != "drop":
                tensors[renamed(name, how)] = tensor
    file = written(tensors, tmp_path / "any.safetensors", metadata_of(source) if with_settings else None)
    try:
        load_lora(pipe, file)
    except ValueError as error:
        text = str(error)
        assert "\n" not in text and "any.safetensors" in text and "; " in text
        assert tensors.keys() != load_file(source).keys() or any("shape" in change for change in changes)
    else:
        loaded = {f"transformer.{name}": tensor for name, tensor in values(pipe.transformer).items()}
        assert same(loaded, tensors) and (not with_settings or set(tensors) == set(names))
    finally:
        pipe.unload_lora_weights()
