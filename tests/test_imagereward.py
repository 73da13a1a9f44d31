"ImageReward: its network against one of torch's own layers, its file, its preparation, its scale."

import math
import pickle
import string

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import BertTokenizer

from vgpo.rewards.base import make_reward, score
from vgpo.rewards.imagereward import TEXT, VISION, ImageReward, RewardNetwork, fill_network, published_name

EYE, READER = 48, 32  # widths
SMALL = {
    "vision": {
        "hidden_size": EYE, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3,
        "image_size": 32, "patch_size": 8},
    "text": {
        "vocab_size": 60, "hidden_size": READER, "encoder_hidden_size": EYE, "intermediate_size": 56,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40, "bos_token_id": 2,
        "sep_token_id": 3}}  # fmt: skip
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def affine(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def published_shapes():
    "The tensors of ImageReward.pt for the small sizes, spelled out after the code that wrote the published file."
    eye, reader = "blip.visual_encoder", "blip.text_encoder"
    shapes = {f"{eye}.cls_token": (1, 1, EYE), f"{eye}.pos_embed": (1, 17, EYE)}
    shapes |= {f"{eye}.patch_embed.proj.weight": (EYE, 3, 8, 8), f"{eye}.patch_embed.proj.bias": (EYE,)}
    for b in (f"{eye}.blocks.0", f"{eye}.blocks.1"):
        shapes |= norm(f"{b}.norm1", EYE) | norm(f"{b}.norm2", EYE)
        shapes |= affine(f"{b}.attn.qkv", 3 * EYE, EYE) | affine(f"{b}.attn.proj", EYE, EYE)
        shapes |= affine(f"{b}.mlp.fc1", 64, EYE) | affine(f"{b}.mlp.fc2", EYE, 64)
    shapes |= norm(f"{eye}.norm", EYE) | norm(f"{reader}.embeddings.LayerNorm", READER)
    shapes |= {f"{reader}.embeddings.word_embeddings.weight": (60, READER)}
    shapes |= {f"{reader}.embeddings.position_embeddings.weight": (40, READER)}
    for b in (f"{reader}.encoder.layer.0", f"{reader}.encoder.layer.1"):
        for attention, width in (("attention", READER), ("crossattention", EYE)):
            shapes |= affine(f"{b}.{attention}.self.query", READER, READER)
            shapes |= affine(f"{b}.{attention}.self.key", READER, width)
            shapes |= affine(f"{b}.{attention}.self.value", READER, width)
            shapes |= affine(f"{b}.{attention}.output.dense", READER, READER)
            shapes |= norm(f"{b}.{attention}.output.LayerNorm", READER)
        shapes |= affine(f"{b}.intermediate.dense", 56, READER) | affine(f"{b}.output.dense", READER, 56)
        shapes |= norm(f"{b}.output.LayerNorm", READER)
    for i, out, into in ((0, 1024, READER), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16)):
        shapes |= affine(f"mlp.layers.{i}", out, into)
    return shapes


@pytest.fixture(scope="module")
def state():
    "Random weights under the published names, in float32, of a size at which every one of them matters."
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in published_shapes().items():
        value = torch.randn(shape, generator=generator)
        value *= 0.2 if len(shape) == 1 or "blocks" in name else math.prod(shape[1:]) ** -0.5
        state[name] = value + 1 if "norm" in name.lower() and name.endswith("weight") else value
    state["blip.visual_encoder.pos_embed"] *= 0.02  # a faint eye: the eps of its norms is felt
    state["blip.visual_encoder.cls_token"] *= 0.02
    state["blip.visual_encoder.patch_embed.proj.weight"] *= 0.02
    return state


def attention(w, names, width, heads, into):
    "torch's own attention, filled with tensors of the given names."
    layer = nn.MultiheadAttention(width, heads, kdim=into, vdim=into, batch_first=True, dtype=torch.float64)
    q, k, v, out = names
    if into == width:
        layer.in_proj_weight.data = torch.cat([w[f"{n}.weight"] for n in (q, k, v)])
    else:
        for part, n in (("q", q), ("k", k), ("v", v)):
            getattr(layer, f"{part}_proj_weight").data = w[f"{n}.weight"]
    layer.in_proj_bias.data = torch.cat([w[f"{n}.bias"] for n in (q, k, v)])
    layer.out_proj.weight.data, layer.out_proj.bias.data = w[f"{out}.weight"], w[f"{out}.bias"]
    return layer


def see(w, pixels):
    "The eye, of torch's TransformerEncoderLayers."
    eye = "blip.visual_encoder"
    x = F.conv2d(pixels, w[f"{eye}.patch_embed.proj.weight"], w[f"{eye}.patch_embed.proj.bias"], stride=8)
    x = torch.cat([w[f"{eye}.cls_token"].expand(len(x), 1, EYE), x.flatten(2).mT], 1) + w[f"{eye}.pos_embed"]
    theirs = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc1.",
              "linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2."}  # fmt: skip
    for i in range(2):
        layer = nn.TransformerEncoderLayer(
            EYE, 3, 64, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True, dtype=torch.float64)  # fmt: skip
        layer.load_state_dict(
            {ours + p: w[f"{eye}.blocks.{i}.{name}{p}"] for ours, name in theirs.items() for p in ("weight", "bias")}
        )
        x = layer(x)
    return F.layer_norm(x, (EYE,), w[f"{eye}.norm.weight"], w[f"{eye}.norm.bias"], 1e-6)


def read(w, seen, ids, mask):
    "The reader, of torch's attention."
    reader = "blip.text_encoder"

    def normed(name, x):
        return F.layer_norm(x, (READER,), w[f"{name}.LayerNorm.weight"], w[f"{name}.LayerNorm.bias"], 1e-12)

    x = w[f"{reader}.embeddings.word_embeddings.weight"][ids]
    x = x + w[f"{reader}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = normed(f"{reader}.embeddings", x)
    for b in (f"{reader}.encoder.layer.0", f"{reader}.encoder.layer.1"):
        for name, y, into, hidden in (("attention", None, READER, mask == 0), ("crossattention", seen, EYE, None)):
            names = [f"{b}.{name}.self.{n}" for n in ("query", "key", "value")] + [f"{b}.{name}.output.dense"]
            y = x if y is None else y
            out = attention(w, names, READER, 4, into)(x, y, y, key_padding_mask=hidden)[0]
            x = normed(f"{b}.{name}.output", x + out)
        inner = F.gelu(x @ w[f"{b}.intermediate.dense.weight"].T + w[f"{b}.intermediate.dense.bias"])
        x = normed(f"{b}.output", x + inner @ w[f"{b}.output.dense.weight"].T + w[f"{b}.output.dense.bias"])
    return x


@torch.no_grad()
def independent(state, pixels, ids, mask):
    "Raw scores in float64."
    w = {k: v.double() for k, v in state.items()}
    h = read(w, see(w, pixels.double()), ids, mask)[:, 0]
    for i in (0, 2, 4, 6, 7):
        h = h @ w[f"mlp.layers.{i}.weight"].T + w[f"mlp.layers.{i}.bias"]
    return (h[:, 0] - 0.16717362830052426) / 1.0333394966054072


def network_of(state, vision=None, text=None):
    "The library's network in float64 (its head in float32), filled with `state`."
    network = RewardNetwork(SMALL["vision"] | (vision or {}), SMALL["text"] | (text or {})).eval()
    fill_network(network, state)
    for part in (network.vision, network.text):
        part.double()
    return network


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 60, (4, 35), generator=generator)
    ids[:, 0] = 2
    mask = (torch.arange(35) < torch.tensor([[35], [20], [5], [3]])).long()
    return torch.randn(4, 3, 32, 32, generator=generator), ids, mask


def test_the_network_against_torchs_own_layers(state, inputs):
    with torch.no_grad():
        raw = network_of(state)(*inputs)
    expected = independent(state, *inputs)
    assert raw.dtype == torch.float32 and expected.std() > 0.03
    torch.testing.assert_close(raw.double(), expected, atol=3e-6, rtol=0)


def test_every_setting_matters(state, inputs):
    "Each of the library's defaults changes the scores by more than the agreement above allows."
    expected, (pixels, ids, mask) = independent(state, *inputs), inputs
    other = ids.clone()
    other[:, 0] = 59
    with torch.no_grad():
        wrong = {
            "heads of the reader": network_of(state, text={"num_attention_heads": 2})(*inputs),
            "heads of the eye": network_of(state, vision={"num_attention_heads": 2})(*inputs),
            "eps of the eye": network_of(state, vision={"layer_norm_eps": 1e-5})(*inputs),
            "first token": network_of(state)(pixels, other, mask),
            "padding": network_of(state)(pixels, ids, torch.ones_like(mask)),
        }
    for name, raw in wrong.items():
        assert (raw.double() - expected).abs().max() > 1e-4, name
    assert TEXT["num_attention_heads"] == 12 and TEXT["encoder_hidden_size"] == VISION["hidden_size"] == 1024
    assert VISION["layer_norm_eps"] == 1e-6 and VISION["num_hidden_layers"] == 24


def test_names_of_the_full_network():
    with torch.device("meta"):
        names = {published_name(k): tuple(v.shape) for k, v in RewardNetwork().state_dict().items()}
    block = 12 * 1024**2 + 13 * 1024  # ViT-L: query, key, value, projection, two wide layers; biases and norms
    eye = 24 * block + 1024 * (1 + 197 + 3 * 16**2 + 1 + 2)  # class token, positions, patches and their bias, norm
    attention = 2 * (768**2 + 768) + 2 * 768  # query, output, norm; keys and values look at 768 or 1024 numbers
    layer = 2 * attention + 2 * (768**2 + 768) + 2 * (768 * 1024 + 768) + 2 * 768 * 3072 + 3072 + 3 * 768
    reader = 12 * layer + 768 * (30524 + 512 + 2)
    head = 769 * 1024 + 1025 * 128 + 129 * 64 + 65 * 16 + 17
    assert len(names) == 620 and sum(map(math.prod, names.values())) == eye + reader + head == 446_206_689
    for name, shape in {
        "blip.visual_encoder.pos_embed": (1, 197, 1024),
        "blip.visual_encoder.blocks.23.attn.qkv.weight": (3072, 1024),
        "blip.text_encoder.embeddings.word_embeddings.weight": (30524, 768),
        "blip.text_encoder.encoder.layer.11.crossattention.self.key.weight": (768, 1024),
        "mlp.layers.0.weight": (1024, 768),
        "mlp.layers.7.weight": (1, 16),
    }.items():
        assert names[name] == shape


def test_small_names_round_trip(state):
    network = RewardNetwork(**SMALL)
    ours = {published_name(k): k for k in network.state_dict()}
    assert ours.keys() == state.keys() == published_shapes().keys() and len(ours) == len(network.state_dict())
    fill_network(network, state)
    for name, key in ours.items():
        assert torch.equal(network.state_dict()[key], state[name])


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase,
              *(f"##{c}" for c in string.ascii_lowercase)]  # fmt: skip


@pytest.fixture(scope="module")
def options(state, tmp_path_factory):
    "Options of a reward whose file is like the published one, with BLIP's unused projections in it."
    folder = tmp_path_factory.mktemp("imagereward")
    BertTokenizer(vocab={w: i for i, w in enumerate(VOCABULARY)}).save_pretrained(folder / "bert")
    unused = {
        "blip.vision_proj.weight": torch.zeros(256, EYE), "blip.text_proj.bias": torch.zeros(256),
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}  # fmt: skip
    torch.save(state | unused, folder / "ImageReward.pt")
    return {"weights": str(folder / "ImageReward.pt"), "tokenizer": str(folder / "bert"), **SMALL}


def spelled(prompt, length=35):
    "Token ids and mask of a prompt in small letters, spelled: the first letter of a word, then ##letters."
    ids = [VOCABULARY.index(c if i == 0 else f"##{c}") for word in prompt.split() for i, c in enumerate(word)]
    ids = [2, *ids[: length - 2], 3]
    return ids + [0] * (length - len(ids)), [1] * len(ids) + [0] * (length - len(ids))


def seen(image, side=32):
    "Bicubic to `side` on the short side, centre square, CLIP's mean and standard deviation."
    h, w = image.shape[:2]
    w, h = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
    image = Image.fromarray(image).resize((w, h), Image.BICUBIC)
    left, top = (w - side) // 2, (h - side) // 2
    image = np.asarray(image.crop((left, top, left + side, top + side)), np.float64) / 255
    return torch.tensor((image - CLIP_MEAN) / CLIP_STD).permute(2, 0, 1)


PROMPTS = ["a dog", "a red cup on a table", "x", "the " * 30, "a dog"]


@pytest.mark.parametrize("size", [(32, 32), (60, 90), (97, 50)])
def test_scores_from_pictures_and_words_up(state, options, size):
    images = np.random.default_rng(0).integers(0, 256, (5, *size, 3)).astype(np.uint8)
    reward = make_reward("ImageReward", **options)
    scores = score(reward, images, PROMPTS, [{}] * 5)
    ids, mask = (torch.tensor(t) for t in zip(*map(spelled, PROMPTS), strict=True))
    expected = independent(state, torch.stack([seen(p) for p in images]), ids, mask)
    torch.testing.assert_close(scores.raw.double(), expected, atol=2e-4, rtol=0)
    scaled = [0.5 * (1 + math.erf(r / math.sqrt(2))) for r in expected.tolist()]
    np.testing.assert_allclose(scores.scaled.numpy(), scaled, atol=2e-4)
    assert scores.strict is None and len(set(scores.raw.tolist())) == 5
    for batch_size in (1, 2):
        torch.testing.assert_close(
            ImageReward(**options, batch_size=batch_size).raw(images, PROMPTS), scores.raw, atol=2e-4, rtol=0
        )
    order = [3, 0, 4, 2, 1]
    shuffled = reward.raw(images[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(shuffled, scores.raw[order], atol=2e-4, rtol=0)


def test_dropout_is_off_and_half_precision_is_close(options):
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    reward = ImageReward(**options)
    assert not reward.network.training and torch.equal(reward.raw(images, PROMPTS[:2]), reward.raw(images, PROMPTS[:2]))
    half = ImageReward(**options, dtype="bfloat16")
    assert half.network.vision.dtype == half.network.text.dtype == torch.bfloat16
    assert half.network.head[0].weight.dtype == torch.float32
    torch.testing.assert_close(half.raw(images, PROMPTS[:2]), reward.raw(images, PROMPTS[:2]), atol=0.1, rtol=0)
    assert ", bfloat16, " in half.version


def test_version_and_other_files(state, options, tmp_path):
    reward = ImageReward(**options)
    assert reward.version.startswith("ImageReward.pt sha256 ") and "tokenizer bert, float32, transf" in reward.version
    assert reward.scale == "normal CDF of raw" and "\n" not in reward.version
    save_file(state, tmp_path / "ImageReward.safetensors")
    other = ImageReward(**options | {"weights": str(tmp_path / "ImageReward.safetensors")})
    image = np.zeros((1, 32, 32, 3), np.uint8)
    assert other.version != reward.version and torch.equal(other.raw(image, ["a"]), reward.raw(image, ["a"]))


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a pickle was run')",)


def test_files_that_are_refused(state, options, tmp_path):
    def load(content, name="bad.pt"):
        torch.save(content, tmp_path / name)
        return ImageReward(**options | {"weights": str(tmp_path / name)})

    for content, message in [
        (
            {k: v for k, v in state.items() if k != "mlp.layers.6.bias"},
            r"bad.pt' do not fit the model: .*mlp.layers.6.bias is missing",
        ),
        (state | {"blip.text_decoder.bias": torch.zeros(1)}, "blip.text_decoder.bias is unknown"),
        (
            state | {"blip.visual_encoder.norm.weight": torch.ones(3)},
            r"norm.weight is \(3,\), not \(48,\); ",
        ),
        (
            {k.removeprefix("blip."): v for k, v in state.items()},
            r"is missing \(and .* is unknown",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            load(content)
    with pytest.raises(ValueError, match="damaged, or hold more than tensors"):
        load({"blip": Harmful()})
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Harmful(), protocol=2))
    with pytest.raises(ValueError, match="damaged, or hold more than tensors"):
        ImageReward(**options | {"weights": str(tmp_path / "raw.pt")})
    with pytest.raises(OSError, match="cannot load weights"):
        ImageReward(**options | {"weights": str(tmp_path / "none.pt")})
    with pytest.raises(ValueError, match="do not fit the model: .*; use the published"):
        ImageReward(options["weights"], tokenizer=options["tokenizer"], text=SMALL["text"],
                    vision=SMALL["vision"] | {"num_hidden_layers": 1})  # fmt: skip


def test_bad_options(options, tmp_path):
    for change, message in [
        ({"dtype": "half"}, "ImageReward.dtype is 'half'; it must be one of 'float32', 'bfloat16', 'float16'"),
        ({"batch_size": 0}, "ImageReward.batch_size is 0; it must be a number v with v>0"),
        ({"text": SMALL["text"] | {"vocab_size": 30}}, "has 57 tokens, the network 30: use google-bert/bert-base-unc"),
    ]:
        with pytest.raises(ValueError, match=message):
            ImageReward(**options | change)
    with pytest.raises(OSError, match="cannot load tokenizer"):
        ImageReward(**options | {"tokenizer": str(tmp_path / "none")})
