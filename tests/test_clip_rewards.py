"Four rewards on a CLIP model: formulas, preprocessing, the names of another library's weights, and what is refused."

import itertools
import math
import os
import shutil
import string
from collections import OrderedDict
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from vgpo.rewards.base import make_reward, score
from vgpo.rewards.clip import Aesthetic, CLIPScore, HPSv2, PickScore, collapse, from_open_clip, letterbox
from vgpo.rewards.weights import read_tensors

LETTERS = string.ascii_lowercase + string.digits + string.punctuation
TOKENS = [*LETTERS, *(c + "</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
SIZE, PATCH, WIDTH, DIM = 32, 8, 48, 24
PROMPTS = ["a red bus", "two cats", "a red bus", "x", "a dog on a boat"]
ROWS = [{}] * 5
MEAN, STD = (np.array(v) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))


def tiny_config():
    shared = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "hidden_act": "gelu"}
    text = shared | {"hidden_size": 32, "vocab_size": len(TOKENS), "bos_token_id": len(TOKENS) - 2}
    vision = shared | {"hidden_size": WIDTH, "image_size": SIZE, "patch_size": PATCH}
    return CLIPConfig(text_config=text | {"eos_token_id": len(TOKENS) - 1}, vision_config=vision, projection_dim=DIM)


def shuffled(model, std=0.2):
    "A model with weights so large that its outputs depend on every pixel and token."
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=std, generator=generator)
    model.logit_scale.data.fill_(math.log(100))
    return model.eval()


@pytest.fixture(scope="module")
def tiny():
    return shuffled(CLIPModel(tiny_config()))


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    "What a CLIP repository on the hub holds, made of random weights."
    folder = tmp_path_factory.mktemp("clip")
    tiny.save_pretrained(folder)
    CLIPTokenizer({token: i for i, token in enumerate(TOKENS)}, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def images():
    "Five wide images: noise, and a blank one."
    images = np.random.default_rng(0).integers(0, 256, (5, 40, 70, 3)).astype(np.uint8)
    images[3] = 0
    return images


def crop_by_hand(image):
    "CLIP's preprocessing of one image at least as wide as high: Pillow, numpy and its settings."
    width = SIZE * image.shape[1] // image.shape[0]
    small = Image.fromarray(image).resize((width, SIZE), Image.BICUBIC)
    left = (width - SIZE) // 2
    pixels = (np.asarray(small.crop((left, 0, left + SIZE, SIZE))) / 255 - MEAN) / STD
    return torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)


def token_ids(prompt):
    "Token ids of a prompt of letters and digits, 77 at most."
    pieces = [c for word in prompt.split() for c in (*word[:-1], word[-1] + "</w>")]
    return [TOKENS.index(t) for t in ("<|startoftext|>", *pieces[:75], "<|endoftext|>")]


@torch.no_grad()
def cosine_by_hand(model, image, prompt):
    "The cosine of an image and a prompt, alone in their batches, from the model's submodules."
    eye, ids = model.vision_model, torch.tensor([token_ids(prompt)])
    x = eye.encoder(eye.pre_layrnorm(eye.embeddings(crop_by_hand(image)[None]))).last_hidden_state[0, 0]
    x = model.visual_projection.weight @ eye.post_layernorm(x)
    c = model.text_projection.weight @ model.text_model(input_ids=ids).last_hidden_state[0, -1]
    return (x @ c / x.norm() / c.norm()).item()


@pytest.fixture(scope="module")
def cosines(tiny, images):
    return torch.tensor([cosine_by_hand(tiny, i, p) for i, p in zip(images, PROMPTS, strict=True)])


def test_clipscore_is_the_cosine_and_negative_ones_are_zero(folder, images, cosines):
    scores = score(make_reward("CLIPScore", weights=folder), images, PROMPTS, ROWS)
    assert_close(scores.raw, cosines, atol=1e-5, rtol=0)
    assert_close(scores.scaled, cosines.clamp(min=0), atol=1e-5, rtol=0)
    assert scores.raw.dtype == torch.float32 and scores.strict is None
    assert (cosines < 0).any() and (cosines > 0).any() and cosines.std() > 0.05  # the test would notice a mix-up


def test_pickscore_is_the_cosine_times_exp_of_the_logit_scale(folder, images, cosines, monkeypatch):
    reward = make_reward("PickScore", weights=folder, processor=folder)
    scores = score(reward, images, PROMPTS, ROWS)
    assert_close(scores.raw, 100 * cosines, atol=1e-3, rtol=0)
    assert_close(scores.scaled, (100 * cosines / 26).clamp(0, 1), atol=1e-4, rtol=0)
    monkeypatch.setattr(reward, "temperature", 1000.0)  # beyond what any checkpoint gives: still within [0, 1]
    assert score(reward, images, PROMPTS, ROWS).scaled.max() == 1
    assert PickScore.weights == "yuvalkirstain/PickScore_v1"
    assert PickScore.processor == HPSv2.processor == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert CLIPScore.weights == Aesthetic.weights == "openai/clip-vit-large-patch14"


def test_the_network_sees_the_middle_of_the_image_scaled_by_pillow(folder, images):
    reward = CLIPScore(folder)
    assert reward.preprocess.backend == "pil"
    assert_close(reward.pixels(images), torch.stack([crop_by_hand(i) for i in images]), atol=1e-6, rtol=0)
    three = images[:, :3, :3]  # three rows: still height, width, channels
    assert_close(reward.pixels(three), torch.stack([crop_by_hand(i) for i in three]), atol=1e-6, rtol=0)
    edges = images.copy()
    edges[:, :, :10], edges[:, :, -10:] = 0, 255  # of the 15 columns at each side that are cut off; 5 for the filter
    assert torch.equal(reward.pixels(edges), reward.pixels(images))
    edges[:, :, 20] = 255
    assert not torch.equal(reward.pixels(edges), reward.pixels(images))


def test_scores_do_not_depend_on_batches_order_or_neighbours(folder, images):
    prompts = ["x", "a long prompt " * 20, "two cats", "a red bus", "x"]
    together = PickScore(folder, folder, batch_size=32)(images, prompts, ROWS).raw
    for batch_size in (1, 2, 3):
        assert_close(
            PickScore(folder, folder, batch_size=batch_size)(images, prompts, ROWS).raw, together, atol=1e-3, rtol=0
        )
    order = [3, 0, 4, 1, 2]
    reward = PickScore(folder, folder, batch_size=2)
    moved = reward(images[order], [prompts[i] for i in order], ROWS).raw
    assert_close(moved, together[order], atol=1e-3, rtol=0)
    assert (together[None] - together[:, None]).abs()[~torch.eye(5, dtype=bool)].min() > 0.1  # all five differ


def test_a_distinct_prompt_is_read_once(folder, images):
    reward, read = CLIPScore(folder, batch_size=2), []
    tokens = reward.tokens
    reward.tokens = lambda prompts: read.extend(prompts) or tokens(prompts)
    reward(images, PROMPTS, ROWS)
    assert read == ["a red bus", "two cats", "x", "a dog on a boat"]


def test_prompts_count_up_to_77_tokens(folder, tiny, images):
    reward, letters = CLIPScore(folder), " ".join("abcdefghij" * 20)
    assert reward.tokens([letters, "x"])["input_ids"].shape == (2, 77)
    assert reward.tokens([letters])["input_ids"][0].tolist() == token_ids(letters)
    whole = letters[: 2 * 75 - 1]  # 75 letters and their spaces, and 2 special tokens
    cut = reward(images[[0] * 4], [whole, whole + " z", letters, whole[:-2]], ROWS[:4]).raw
    assert cut[0] == cut[1] == cut[2] and (cut[0] - cut[3]).abs() > 1e-4
    assert cut[0].item() == pytest.approx(cosine_by_hand(tiny, images[0], letters), abs=1e-5)


@pytest.mark.parametrize("color", [0, 255])
def test_blank_images_and_empty_prompts_are_scored(folder, color):
    blank = np.full((1, 64, 64, 3), color, np.uint8)
    for prompt in ("", "x"):
        assert score(CLIPScore(folder), blank, [prompt], [{}]).raw.isfinite().all()


def test_bfloat16_keeps_the_temperature_and_roughly_the_scores(folder, images, cosines):
    reward = PickScore(folder, folder, dtype="bfloat16")
    assert reward.model.dtype == torch.bfloat16 and "bfloat16" in reward.version
    assert reward.temperature == pytest.approx(100, rel=1e-6)  # exp of the logit scale in bfloat16 would be 98.86
    scores = score(reward, images, PROMPTS, ROWS)
    assert scores.raw.dtype == torch.float32
    assert_close(scores.raw / 100, cosines, atol=0.05, rtol=0)  # 2^-8 relative in each of some ten products in a row


# Aesthetic


@pytest.fixture(scope="module")
def mlp():
    "The predictor's architecture: dropout between linear layers, no activation."
    torch.manual_seed(1)
    sizes, dropout = [DIM, 40, 16, 8, 4, 1], (0.2, 0.2, 0.1)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    for at, p in zip((1, 3, 5), dropout, strict=True):
        layers.insert(at, nn.Dropout(p))
    mlp = nn.ModuleDict({"layers": nn.Sequential(*layers)}).eval()
    for p in mlp.parameters():
        nn.init.normal_(p, std=0.6)
    return mlp


@pytest.fixture(scope="module")
def head(mlp, tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(mlp.state_dict(), path)
    return path


def test_aesthetic_is_the_layered_network_on_the_unit_vector(folder, tiny, images, mlp, head):
    assert sorted(mlp.state_dict())[::2] == [f"layers.{n}.bias" for n in (0, 2, 4, 6, 7)]  # as in the published file
    reward = make_reward("Aesthetic", weights=folder, head=head)
    scores = score(reward, images, PROMPTS, ROWS)
    with torch.no_grad():
        x = tiny.get_image_features(torch.stack([crop_by_hand(i) for i in images])).pooler_output
        truth = mlp["layers"](x / x.norm(dim=-1, keepdim=True))[:, 0]
    assert_close(scores.raw, truth, atol=1e-5, rtol=0)
    assert_close(scores.scaled, (truth / 10).clamp(0, 1), atol=1e-6, rtol=0)
    assert torch.equal(score(reward, images, ["other"] * 5, ROWS).raw, scores.raw)  # the prompt does not count
    assert truth.std() > 0.01


def test_collapse_is_exact_for_any_input(mlp):
    w, b = collapse(mlp.state_dict())
    x = torch.randn(100, DIM, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(x @ w + b, mlp["layers"](x)[:, 0], atol=1e-4, rtol=1e-5)
    many = {
        f"layers.{n}.{k}": torch.tensor([[n + 1.0]] if k == "weight" else [1.0])
        for n in range(12)
        for k in ("weight", "bias")
    }
    w, b = collapse(many)  # x -> (n + 1) x + 1 twelve times: the order of layers 2 and 10 shows in the bias
    bias = 0.0
    for n in range(12):
        bias = (n + 1) * bias + 1
    assert w.item() == math.factorial(12) and b.item() == pytest.approx(bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.2.bias"), "layers.2.bias"),
        (lambda s: s.update({"layers.7.weight": torch.zeros(2, 4), "layers.7.bias": torch.zeros(2)}), "has 2 outputs"),
        (lambda s: s.update({"layers.4.weight": torch.zeros(8, 5)}), ""),
        (lambda s: s.update({"layers.0.running_mean": torch.zeros(8)}), "other tensors"),
        (lambda s: s.update({"visual": torch.zeros(8)}), ""),
    ],
)
def test_another_head_is_refused(mlp, change, message):
    state = dict(mlp.state_dict())
    change(state)
    with pytest.raises(ValueError, match=f"head must be linear layers .*{message}.*file of the aesthetic predictor"):
        collapse(state)


def test_a_head_of_another_width_is_refused(folder, tmp_path):
    torch.save({"layers.0.weight": torch.zeros(1, 768), "layers.0.bias": torch.zeros(1)}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=f"takes 768 numbers and .* gives {DIM}: the published head goes with"):
        Aesthetic(folder, head=tmp_path / "head.pth")


# HPSv2: a model as open_clip writes it, forward pass and all


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, inner), "gelu": nn.GELU(), "c_proj": nn.Linear(inner, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, mask=None):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, 40) for _ in range(2))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(WIDTH))
        self.positional_embedding = nn.Parameter(torch.empty((SIZE // PATCH) ** 2 + 1, WIDTH))
        self.proj, self.conv1 = nn.Parameter(torch.empty(WIDTH, DIM)), nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.ln_pre, self.transformer, self.ln_post = nn.LayerNorm(WIDTH), Blocks(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual, self.transformer, self.ln_final = Visual(), Blocks(32), nn.LayerNorm(32)
        self.token_embedding, self.logit_scale = nn.Embedding(len(TOKENS), 32), nn.Parameter(torch.empty(()))
        self.positional_embedding = nn.Parameter(torch.empty(77, 32))
        self.text_projection = nn.Parameter(torch.empty(32, DIM))

    def forward(self, pixels, prompt):
        ids = torch.tensor([token_ids(prompt) + [0] * (77 - len(token_ids(prompt)))])  # open_clip pads with zeros
        mask = torch.full((77, 77), -math.inf).triu(1)
        c = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, mask))
        c = c[0, ids.argmax()] @ self.text_projection  # the end-of-text token has the highest number
        return nn.functional.cosine_similarity(self.visual(pixels[None]), c[None]).item()


@pytest.fixture(scope="module")
def open_clip():
    return shuffled(OpenCLIP())


@pytest.fixture(scope="module")
def checkpoint(open_clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": open_clip.state_dict()}, path)
    return path


def letterbox_by_hand(image):
    "One channel after the other by Pillow, on floats; black bars; then CLIP's mean and deviation."
    height, width = (round(side * SIZE / max(image.shape[:2])) for side in image.shape[:2])
    floats = [Image.fromarray(image[..., c].astype(np.float32) / 255) for c in range(3)]
    canvas = np.zeros((SIZE, SIZE, 3), np.float32)
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    small = [np.asarray(channel.resize((width, height), Image.BICUBIC)) for channel in floats]
    canvas[top : top + height, left : left + width] = np.stack(small, -1)
    return torch.tensor((canvas - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)


@pytest.mark.parametrize("turned", [False, True])
def test_hpsv2_is_open_clips_cosine_on_the_letterboxed_picture(folder, open_clip, checkpoint, images, turned):
    if turned:
        images = images.transpose(0, 2, 1, 3).copy()
    reward = make_reward("HPSv2", weights=checkpoint, processor=folder)
    pixels = torch.stack([letterbox_by_hand(i) for i in images])
    assert_close(reward.pixels(images), pixels, atol=2e-5, rtol=0)
    scores = score(reward, images, PROMPTS, ROWS)
    with torch.no_grad():
        truth = torch.tensor([open_clip(x, p) for x, p in zip(pixels, PROMPTS, strict=True)])
    assert_close(scores.raw, truth, atol=1e-4, rtol=0)  # a factor 10 below the spread that is required here:
    assert truth.std() > 1e-3
    assert_close(scores.scaled, truth.clamp(min=0), atol=1e-4, rtol=0)


def test_the_map_of_names_is_one_to_one(open_clip):
    mapped = from_open_clip(open_clip.state_dict())
    expected = CLIPModel(tiny_config()).state_dict()
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in expected.items()}
    assert sum(v.numel() for v in mapped.values()) == sum(v.numel() for v in open_clip.state_dict().values())
    assert list(from_open_clip({"score_predictor.layers.0.weight": torch.zeros(1)})) == [
        "score_predictor.layers.0.weight"
    ]


def test_a_half_precision_checkpoint_runs_in_float32(folder, open_clip, checkpoint, images, tmp_path):
    torch.save({k: v.half() for k, v in open_clip.state_dict().items()}, tmp_path / "half.pt")
    half, full = (HPSv2(path, folder) for path in (tmp_path / "half.pt", checkpoint))
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert_close(half(images, PROMPTS, ROWS).raw, full(images, PROMPTS, ROWS).raw, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("ln_final.bias"), r"text_model.final_layer_norm.bias is missing; "),
        (lambda s: s.pop("visual.transformer.resblocks.1.attn.in_proj_bias"), r"k_proj.bias is missing \(and 2 more\)"),
        (lambda s: s.update({"score_predictor.weight": torch.zeros(1)}), "score_predictor.weight is unknown"),
        (lambda s: s.update({"text_projection": torch.zeros(30, DIM)}), rf"\({DIM}, 30\), not \({DIM}, 32\)"),
        (lambda s: s.update({"visual.transformer.resblocks.2.ln_1.bias": torch.zeros(1)}), "layers.2.*is unknown"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(folder, open_clip, tmp_path, change, message):
    state = dict(open_clip.state_dict())
    change(state)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=f"odd.pt' do not fit the model: .*{message}.*open_clip model of that size"):
        HPSv2(tmp_path / "odd.pt", folder)


@pytest.mark.parametrize("tower", ["text_config", "vision_config"])
def test_hpsv2_refuses_quick_gelu(folder, checkpoint, tmp_path, tower):
    shutil.copytree(folder, tmp_path / "openai")
    config = tiny_config()
    getattr(config, tower).hidden_act = "quick_gelu"
    config.save_pretrained(tmp_path / "openai")
    with pytest.raises(ValueError, match="with gelu and quick_gelu; HPSv2 was trained with gelu: use laion/CLIP"):
        HPSv2(checkpoint, tmp_path / "openai")


def test_letterbox_of_a_square_and_of_a_fitting_picture_and_without_antialiasing():
    rng = np.random.default_rng(1)
    square, fitting = (rng.integers(0, 256, (2, *size, 3)).astype(np.uint8) for size in ((64, 64), (20, 32)))
    assert_close(letterbox(fitting, 32)[:, :, 6:26], torch.tensor(fitting).permute(0, 3, 1, 2) / 255)
    assert letterbox(fitting, 32)[:, :, [*range(6), *range(26, 32)]].abs().max() == 0
    assert letterbox(square, 32).shape == (2, 3, 32, 32) == letterbox(np.zeros((2, 1, 640, 3), np.uint8), 32).shape
    halved = torch.tensor(square).permute(0, 3, 1, 2) / 255
    rough = nn.functional.interpolate(halved, scale_factor=0.5, mode="bicubic")
    assert_close(letterbox(square, 32, antialias=False), rough, atol=1e-5, rtol=0)
    assert (letterbox(square, 32) - rough).abs().max() > 0.2


def test_hpsv2_cleans_prompts_as_open_clip_does(folder, checkpoint):
    reward = HPSv2(checkpoint, folder, antialias=False)
    curly, plain = reward.tokens(["the spy’s “car” &amp;amp; cat"]), reward.tokens(['the spy\'s "car" & cat'])
    assert torch.equal(curly["input_ids"], plain["input_ids"])
    assert reward.version.endswith("without antialiasing")


# What is refused, and what is recorded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "CLIPScore.dtype is 'int8'; it must be one of 'float32', 'bfloat16', 'float16'"),
        ({"batch_size": 0}, "CLIPScore.batch_size is 0; it must be a number v with v>0"),
        ({"revision": "v2"}, "revision 'v2' has no meaning for the local .*leave it out"),
    ],
)
def test_bad_options(folder, options, message):
    with pytest.raises(ValueError, match=message):
        make_reward("CLIPScore", weights=folder, **options)


def test_an_unknown_option_is_named(folder):
    for name in ("CLIPScore", "HPSv2", "Aesthetic"):
        with pytest.raises(ValueError, match="batchsize"):
            make_reward(name, weights=folder, batchsize=2)


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda f, gone: CLIPScore(gone, f), "weights"),
        (lambda f, gone: CLIPScore(f, gone), "processor"),
        (lambda f, gone: CLIPScore(f, f.parent), "processor"),  # a folder without one
        (lambda f, gone: Aesthetic(f, head=gone / "head.pth"), "weights"),
        (lambda f, gone: HPSv2(gone / "hps.pt", f), "weights"),
        (lambda f, gone: HPSv2("owner/name", f), "weights"),  # a file is needed
        (lambda f, gone: PickScore("nobody/nothing", f), "weights"),
        (lambda f, gone: HPSv2("nobody/nothing/hps.pt", f), "weights"),
    ],
)
def test_what_cannot_be_found_is_named_with_a_remedy(folder, tmp_path, monkeypatch, make, option):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=f"cannot load {option} '.*': check the name and the connection to the hub"):
        make(folder, tmp_path / "gone")


def test_weights_of_half_a_model_are_refused(folder, tiny, tmp_path):
    tiny.text_model.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="text' do not fit the model: .* missing .*; give those of a whole CLIPModel"):
        CLIPScore(tmp_path / "text", folder)
    shutil.copytree(folder, tmp_path / "shape")
    config = tiny_config()
    config.projection_dim = DIM - 8
    config.save_pretrained(tmp_path / "shape")
    with pytest.raises(ValueError, match=r"text_projection.weight is \(\d+, \d+\), not \(\d+, \d+\) \(and 1 more\)"):
        CLIPScore(tmp_path / "shape")
    (tmp_path / "shape" / "model.safetensors").write_bytes(b"nothing like it")
    with pytest.raises(OSError, match="cannot load weights"):
        CLIPScore(tmp_path / "shape")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"layers.0.weight": torch.zeros(1)}, "extra": Bomb()}, "bomb.pth")
    with pytest.raises(ValueError, match="'bomb.pth' are damaged, or hold more than tensors"):
        read_tensors("bomb.pth")
    assert not Path("exploded").exists()
    for name, content in {"empty.pth": b"", "noise.pt": b"\x80\x02noise" * 50}.items():
        Path(name).write_bytes(content)
        with pytest.raises(ValueError, match=f"'{name}' are damaged"):
            read_tensors(name)
    torch.save([torch.zeros(1)], "list.pth")
    torch.save({"epoch": 3}, "numbers.pth")
    for name in ("list.pth", "numbers.pth"):
        with pytest.raises(ValueError, match=f"'{name}' are not a table of named tensors"):
            read_tensors(name)


def test_the_version_tells_weights_apart(folder, tiny, head, checkpoint, tmp_path):
    shutil.copytree(folder, tmp_path / folder.name)
    first, copy = CLIPScore(folder).version, CLIPScore(tmp_path / folder.name).version
    assert first == copy and first.startswith(f"{folder.name} sha256 ") and "\n" not in first
    assert all(f"{name} " in first for name in ("transformers", "torch", "pillow")) and "float32" in first
    other = shuffled(CLIPModel(tiny_config()), std=0.1)
    other.save_pretrained(tmp_path / folder.name)
    assert CLIPScore(tmp_path / folder.name).version != first
    assert Aesthetic(folder, head=head).version.startswith("sac+logos+ava1-l14-linearMSE.pth sha256 ")
    assert HPSv2(checkpoint, folder).version.startswith("HPS_v2.1_compressed.pt sha256 ")


def test_names_on_the_hub_are_recorded_with_their_commit(folder, checkpoint, images, cosines, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name, source in {"models--own--pick": folder, "models--own--hps": checkpoint.parent}.items():
        shutil.copytree(source, tmp_path / name / "snapshots" / commit)
        for ref in ("main", "v2"):
            (tmp_path / name / "refs").mkdir(exist_ok=True)
            (tmp_path / name / "refs" / ref).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    reward = PickScore("own/pick", "own/pick", revision="v2")
    assert reward.version.startswith("own/pick@0123456789ab, processor own/pick, ")
    assert_close(score(reward, images, PROMPTS, ROWS).raw, 100 * cosines, atol=1e-3, rtol=0)
    hps = HPSv2(f"own/hps/{checkpoint.name}", "own/pick")
    assert hps.version.startswith(f"own/hps/{checkpoint.name}@0123456789ab, processor own/pick, ")
