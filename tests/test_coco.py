"GenEval's detector: names, preprocessing, objects from queries, colours, and verdicts on drawn scenes."

import shutil
import string
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

from vgpo.rewards.base import RewardError, make_reward, score
from vgpo.rewards.coco import (
    COCO_CLASSES,
    COLOR_WORDS,
    CocoDetector,
    ColorClassifier,
    GenEval,
    check_names,
    cut_out,
    find_instances,
    load_mask2former,
    make_processor,
    mask_box,
    to_pixels,
)

PAINT = {
    "red": (215, 35, 35), "orange": (250, 150, 30), "yellow": (245, 225, 50), "green": (50, 160, 60),
    "blue": (50, 80, 220), "purple": (130, 50, 170), "pink": (250, 150, 190), "brown": (120, 75, 40),
    "black": (20, 20, 20), "white": (245, 245, 245)}  # fmt: skip
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tiny_mask2former(**more):
    "A random Mask2Former of 125,000 weights."
    swin = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = {
        "num_labels": 80, "num_queries": 10, "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32,
        "encoder_feedforward_dim": 16, "dim_feedforward": 16, "encoder_layers": 1, "decoder_layers": 3,
        "num_attention_heads": 2}  # fmt: skip
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, **(config | more)))


def tiny_clip():
    "A random CLIPModel of 48,000 weights, and a tokenizer that spells the words it does not know."
    letters = [*string.ascii_lowercase, "-"]
    symbols = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=[], model_max_length=77)
    tokenizer.add_tokens([AddedToken(w, single_word=True) for w in (*COLOR_WORDS, "photo", "object", "colored")])
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision = small | {"image_size": 32, "patch_size": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)), tokenizer


def clip_pixels(crop, side):
    "CLIP's preprocessing of one (h, w, 3) uint8 crop, with PIL and numpy."
    h, w = crop.shape[:2]
    w, h = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
    image = Image.fromarray(crop).resize((w, h), Image.BICUBIC)
    left, top = (w - side) // 2, (h - side) // 2
    image = np.asarray(image.crop((left, top, left + side, top + side)), np.float64) / 255
    return torch.tensor((image - CLIP_MEAN) / CLIP_STD, dtype=torch.float32).permute(2, 0, 1)[None]


def teach_colors(model, tokenizer):
    "Contrastive training on plain patches, about a second."
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, 160)
    for step in range(160):
        wording = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")[step % 3]
        label = ("dog", "cup", "clock", "teddy bear")[step % 4]
        tokens = tokenizer([wording.format(c, label) for c in COLOR_WORDS], padding=True, return_tensors="pt")
        paint = [np.clip(np.add(PAINT[c], rng.integers(-15, 16, 3)), 0, 255).astype(np.uint8) for c in COLOR_WORDS]
        pixels = torch.cat([clip_pixels(np.broadcast_to(p, (32, 32, 3)).copy(), 32) for p in paint])
        loss = model(**tokens, pixel_values=pixels, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Saved: a random Mask2Former, and a CLIP that knows the ten colours of plain patches."
    folder = tmp_path_factory.mktemp("coco")
    torch.manual_seed(0)
    model, tokenizer = tiny_clip()
    teach_colors(model, tokenizer)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "clip")
    tiny_mask2former().save_pretrained(folder / "mask2former")
    return {"weights": str(folder / "mask2former"), "clip_weights": str(folder / "clip")}


def test_the_names_are_genevals_in_cocos_order():
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 80 and len(COLOR_WORDS) == 10
    known = {
        "person": 0, "traffic light": 9, "stop sign": 11, "dog": 16, "frisbee": 29, "tennis racket": 38, "bowl": 45,
        "hot dog": 52, "couch": 57, "tv": 62, "computer mouse": 64, "tv remote": 65, "computer keyboard": 66,
        "cell phone": 67, "teddy bear": 77, "hair drier": 78, "toothbrush": 79}  # fmt: skip
    assert {name: COCO_CLASSES.index(name) for name in known} == known
    assert not {"mouse", "remote", "keyboard"} & set(COCO_CLASSES)


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((64, 96), (800, 1200), (800, 1216)),
        ((96, 64), (1200, 800), (1216, 800)),
        ((60, 120), (666, 1333), (672, 1344)),  # the long side decides
    ],
)
def test_pictures_are_scaled_padded_and_not_stretched(size, resized, padded):
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3)).astype(np.uint8)
    pixels, found = to_pixels(images, make_processor())
    assert found == resized and pixels.shape == (2, 3, *padded) and pixels.dtype == torch.float32
    for image, got in zip(images, pixels, strict=True):
        expected = np.asarray(Image.fromarray(image).resize(resized[::-1], Image.BILINEAR), np.float64) / 255
        expected = torch.tensor((expected - IMAGENET_MEAN) / IMAGENET_STD, dtype=torch.float32).permute(2, 0, 1)
        torch.testing.assert_close(got[:, : resized[0], : resized[1]], expected, atol=1e-5, rtol=0)
        assert (got[:, resized[0] :] == 0).all() and (got[:, :, resized[1] :] == 0).all()


def bilinear(image, size):
    "Bilinear resizing of `image` (h, w) by the formula, pixel by pixel; centres at half-integers, edges repeated."
    (h, w), (to_h, to_w) = image.shape, size
    out = np.zeros(size)
    for i in range(to_h):
        for j in range(to_w):
            y, x = max((i + 0.5) * h / to_h - 0.5, 0), max((j + 0.5) * w / to_w - 0.5, 0)
            top, left = int(y), int(x)
            fy, fx = y - top, x - left
            bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
            upper = image[top, left] * (1 - fx) + image[top, right] * fx
            lower = image[bottom, left] * (1 - fx) + image[bottom, right] * fx
            out[i, j] = upper * (1 - fy) + lower * fy
    return out


def find_slowly(class_logits, mask_logits, padded, resized, size, top):
    "Independent of torch's kernels: loops over queries, classes and pixels, in float64."
    pairs, found = [], []
    for q, row in enumerate(class_logits.tolist()):
        total = sum(np.exp(v) for v in row)
        pairs += [(np.exp(v) / total, q, c) for c, v in enumerate(row[:-1])]
    masks = {}
    for chance, q, c in sorted(pairs, reverse=True)[:top]:
        if q not in masks:
            large = bilinear(mask_logits[q].double().numpy(), padded)
            masks[q] = bilinear(large[: resized[0], : resized[1]], size)
        inside = [v for v in masks[q].flatten() if v > 0]
        if not inside:
            continue
        rows, columns = np.nonzero(masks[q] > 0)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        found.append((chance * sum(1 / (1 + np.exp(-v)) for v in inside) / len(inside), c, box, masks[q] > 0))
    return sorted(found, key=lambda f: -f[0])


@pytest.mark.parametrize(
    ("padded", "resized", "size"),
    [
        ((32, 64), (24, 50), (18, 37)),  # padding on both sides, the image smaller than the input
        ((64, 32), (64, 21), (70, 23)),  # padding on the right, the image larger
        ((32, 32), (32, 32), (20, 20)),
    ],
)
def test_objects_from_queries_against_a_slow_program(padded, resized, size):
    generator = torch.Generator().manual_seed(1)
    class_logits = 2.5 * torch.randn(6, 81, generator=generator)
    mask_logits = 3 * torch.randn(6, padded[0] // 4, padded[1] // 4, generator=generator)
    mask_logits[2] = -mask_logits[2].abs()  # an empty mask
    slow = find_slowly(class_logits, mask_logits, padded, resized, size, top=100)
    assert 0 < len(slow) < 100  # some of the hundred pairs belong to the empty mask
    for min_score in (0.0, 0.02, 0.1, 0.999):
        expected = [f for f in slow if f[0] > min_score]
        scores, classes, masks = find_instances(class_logits, mask_logits, padded, resized, size, min_score=min_score)
        np.testing.assert_allclose(scores.numpy(), [f[0] for f in expected], rtol=1e-5)
        assert classes.tolist() == [f[1] for f in expected] and masks.shape == (len(expected), *size)
        for mask, (_, _, box, drawn) in zip(masks.numpy(), expected, strict=True):
            assert mask_box(mask) == box and (mask == drawn).all()
    assert len(find_instances(class_logits, mask_logits, padded, resized, size, top=7)[0]) <= 7


def test_a_query_may_give_two_objects_and_no_box_suppresses_another():
    classes = torch.full((3, 81), -10.0)
    classes[0, 0] = classes[0, 5] = 3.0  # half person, half bus
    classes[1, 0] = 3.0  # the same person again
    classes[2, 80] = 3.0  # no object
    scores, found, masks = find_instances(classes, torch.ones(3, 4, 4), (16, 16), (16, 16), (8, 8), min_score=0.3)
    confidence = torch.tensor(1.0).sigmoid()  # of the masks
    torch.testing.assert_close(scores, confidence * torch.tensor([1.0, 0.5, 0.5]), atol=1e-3, rtol=0)
    assert found[0] == 0 and sorted(found[1:].tolist()) == [0, 5] and masks.all()


def say(scene, padded, resized, size, queries=8):
    "Outputs of a perfect network for `scene`: mask logits are ten times the signed distance to the nearest side."
    classes, masks = torch.zeros(queries, 81), torch.full((queries, padded[0] // 4, padded[1] // 4), -1.0)
    classes[:, 80] = 20
    y = (torch.arange(masks.shape[1]) + 0.5) * 4 * size[0] / resized[0]
    x = (torch.arange(masks.shape[2]) + 0.5) * 4 * size[1] / resized[1]
    for q, (name, (x0, y0, x1, y1), p, *_) in enumerate(scene):
        classes[q] = float(np.log((1 - p) / 80))
        classes[q, COCO_CLASSES.index(name)] = float(np.log(p))
        dx, dy = torch.minimum(x - x0, x1 - x), torch.minimum(y - y0, y1 - y)
        masks[q] = 10 * torch.minimum(dx[None, :], dy[:, None])
    return classes, masks


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [
        ((512, 768), (800, 1200), (800, 1216)),
        ((768, 512), (1200, 800), (1216, 800)),
        ((512, 512), (800, 800), (800, 800)),
        ((400, 800), (666, 1333), (672, 1344)),
    ],
)
def test_boxes_of_drawn_rectangles_are_exact(size, resized, padded):
    h, w = size
    scene = [("dog", (0, 0, 90, 61), 0.95), ("zebra", (w - 131, h - 77, w, h), 0.8), ("cup", (99, 103, 211, 180), 0.6)]
    found = find_instances(*say(scene, padded, resized, size), padded, resized, size, min_score=0.59)  # just below
    for (name, box, p), s, c, mask in zip(scene, *found, strict=True):
        x0, y0, x1, y1 = mask_box(mask.numpy())
        assert COCO_CLASSES[c] == name and (x0, y0, x1, y1) == box and mask[y0:y1, x0:x1].float().mean() > 0.999
        y, x = np.mgrid[y0:y1, x0:x1] + 0.5  # mean sigmoid of the distances, at the image's own pixels
        distance = np.minimum(np.minimum(x - x0, x1 - x), np.minimum(y - y0, y1 - y))
        assert s.item() == pytest.approx(p * (1 / (1 + np.exp(-10 * distance))).mean(), abs=1e-3)


def test_cut_out():
    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    mask = np.zeros((4, 5), bool)
    mask[1, 2] = mask[2, 3] = True
    box = mask_box(mask)
    crop = cut_out(image, mask, box)
    assert box == (2, 1, 4, 3) and crop.shape == (2, 2, 3) and crop.dtype == np.uint8
    assert (crop[0, 0] == image[1, 2]).all() and (crop[1, 1] == image[2, 3]).all()
    assert (crop[0, 1] == 153).all() and (crop[1, 0] == 153).all()


def test_colors_against_an_independent_computation(folders, tmp_path):
    torch.manual_seed(3)
    model, tokenizer = tiny_clip()  # random weights: the answers are arbitrary, and must be the same
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    model.eval()
    rng = np.random.default_rng(0)
    crops = [rng.integers(0, 256, (*rng.integers(5, 80, 2), 3)).astype(np.uint8) for _ in range(12)]
    crops += [np.broadcast_to(np.uint8(rgb), (40, 20, 3)) for rgb in PAINT.values()]

    def unit(v):
        return v / v.norm()

    def text_embedding(text):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        hidden = model.text_model(input_ids=ids).last_hidden_state[0, -1]  # the end of the text
        return unit(model.text_projection(hidden))

    def image_embedding(crop):
        hidden = model.vision_model(pixel_values=clip_pixels(crop, 32)).last_hidden_state[0, 0]  # the class token
        return unit(model.visual_projection(model.vision_model.post_layernorm(hidden)))

    classifier = ColorClassifier(str(tmp_path), batch_size=5)
    answers = set()
    for label in ("bench", "hot dog"):
        with torch.no_grad():
            wordings = [[f"a photo of a {c} {label}", f"a photo of a {c}-colored {label}", f"a photo of a {c} object"]
                        for c in COLOR_WORDS]  # fmt: skip
            head = torch.stack([unit(sum(text_embedding(t) for t in three) / 3) for three in wordings])
            expected = [COLOR_WORDS[(head @ image_embedding(crop)).argmax()] for crop in crops]
        assert classifier(crops, label) == expected
        torch.testing.assert_close(classifier.heads[label], head, atol=1e-5, rtol=0)
        assert [classifier([crop], label)[0] for crop in crops] == expected  # one by one
        answers |= set(expected)
    assert len(answers) > 2


def test_the_whole_chain_on_a_real_tiny_network(folders):
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3)).astype(np.uint8)
    detector = CocoDetector(**folders, min_score=0.0)  # both images in one batch
    found = detector(images)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folders["weights"]).eval()
    for image, detections in zip(images, found, strict=True):  # the same by hand, one image at a time
        pixels, resized = to_pixels(image[None], make_processor())
        with torch.no_grad():
            out = model(pixel_values=pixels)
        scores, classes, masks = find_instances(
            out.class_queries_logits[0], out.masks_queries_logits[0], tuple(pixels.shape[2:]), resized, (48, 64)
        )
        assert len(detections) == len(scores) > 0
        np.testing.assert_allclose([d.score for d in detections], scores.numpy(), atol=1e-6)
        for d, mask in list(zip(detections, masks.numpy(), strict=True))[:5]:
            assert d.box == mask_box(d.mask) and d.label in COCO_CLASSES and d.color in COLOR_WORDS
            assert (d.mask == mask).mean() > 0.999
    half = CocoDetector(**folders, dtype="bfloat16", min_score=0.0)  # CLIP only: the detections stay what they are
    assert half.model.dtype == torch.float32 and half.colors.model.dtype == torch.bfloat16
    again = half(images[:1])[0]
    assert [(d.label, d.box) for d in again] == [(d.label, d.box) for d in found[0]] and again[0].color in COLOR_WORDS


class Told(torch.nn.Module):
    "In place of Mask2Former: says what a perfect network would say of the given scenes."

    def __init__(self, scenes, size):
        super().__init__()
        self.scenes, self.size = scenes, size
        self.resized = to_pixels(np.zeros((1, *size, 3), np.uint8), make_processor())[1]

    def forward(self, pixel_values):
        said = [say(s, pixel_values.shape[2:], self.resized, self.size) for s in self.scenes]
        classes, masks = (torch.stack(part) for part in zip(*said, strict=True))
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)


def draw(scene, size):
    image = Image.new("RGB", size[::-1], (90, 95, 100))
    for _, (x0, y0, x1, y1), _, color in scene:
        ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), fill=PAINT[color])
    return np.asarray(image)


def row(tag, *include, exclude=()):
    return {"tag": tag, "prompt": f"a photo, {tag}", "include": list(include), "exclude": list(exclude)}


def thing(label, count=1, **more):
    return {"class": label, "count": count} | more


SIZE = (160, 250)  # scaled to 800 x 1250, padded to 800 x 1280
LEFT, RIGHT = (20, 60, 90, 140), (150, 50, 230, 150)
DOG_RIGHT = row("position", thing("teddy bear"), thing("dog", position=["right of", 0]))
CUP_ABOVE = row("position", thing("dog"), thing("cup", position=["above", 0]))
TWO = row("counting", thing("clock", 2), exclude=[thing("clock", 3)])
GREEN_ORANGE = row("color_attr", thing("cup", color="green"), thing("dog", color="orange"))
CASES = [  # scene, row, right?, soft
    ([("teddy bear", LEFT, 0.9, "brown"), ("dog", RIGHT, 0.9, "white")], DOG_RIGHT, True, 1.0),
    ([("dog", LEFT, 0.9, "white"), ("teddy bear", RIGHT, 0.9, "brown")], DOG_RIGHT, False, 0.5),
    ([("teddy bear", (20, 20, 90, 80), 0.9, "brown"), ("dog", (40, 85, 120, 155), 0.9, "white")],
     DOG_RIGHT, False, 0.5),  # below, and only a little to the right
    ([("dog", (90, 100, 150, 150), 0.9, "black"), ("cup", (100, 10, 130, 50), 0.5, "red")], CUP_ABOVE, True, 1.0),
    ([("dog", (90, 100, 150, 150), 0.9, "black"), ("cup", (100, 10, 130, 50), 0.29, "red")], CUP_ABOVE, False, 0.25),
    ([("clock", LEFT, 0.97, "red"), ("clock", RIGHT, 0.97, "blue")], TWO, True, 1.0),
    ([("clock", LEFT, 0.97, "red"), ("clock", RIGHT, 0.89, "blue")], TWO, False, 0.5),  # counting asks for 0.9
    ([("clock", LEFT, 0.97, "red"), ("clock", RIGHT, 0.97, "blue"), ("clock", (100, 5, 140, 45), 0.97, "pink")],
     TWO, False, 2 / 3),
    ([("cup", LEFT, 0.9, "green"), ("dog", RIGHT, 0.9, "orange")], GREEN_ORANGE, True, 1.0),
    ([("cup", LEFT, 0.9, "orange"), ("dog", RIGHT, 0.9, "green")], GREEN_ORANGE, False, 0.5),
    ([("cup", LEFT, 0.9, "green"), ("dog", RIGHT, 0.9, "purple")], GREEN_ORANGE, False, 0.75),
    ([("dog", LEFT, 0.9, "pink"), ("zebra", RIGHT, 0.9, "black")], row("single_object", thing("dog")), True, 1.0),
]  # fmt: skip


def test_verdicts_on_drawn_scenes(folders):
    scenes, rows, verdicts, soft = zip(*CASES, strict=True)
    images = np.stack([draw(s, SIZE) for s in scenes])
    reward = make_reward("GenEval", **folders, batch_size=len(scenes))
    reward.detector.model = Told(scenes, SIZE)
    for scene, found in zip(scenes, reward.detector(images), strict=True):
        drawn = {(name, box, color) for name, box, p, color in scene if p > 0.3}
        assert {(d.label, d.box, d.color) for d in found} == drawn
    scores = score(reward, images, [r["prompt"] for r in rows], list(rows))
    assert scores.strict.tolist() == list(verdicts)
    np.testing.assert_allclose(scores.raw.numpy(), soft, atol=1e-6)
    assert "found 1" in scores.details[6]["reasons"][0] and scores.details[11]["found"] == {"dog": 1, "zebra": 1}

    golden = {0: 1.0, 1: 0.75, 7: 0.5, 10: 0.75}  # one colour wrong, or the position wrong: 0.75
    compat = GenEval(**folders, flow_grpo_compat=True)
    compat.detector.model = Told([scenes[i] for i in golden], SIZE)
    rows = [rows[i] for i in golden]
    raw = score(compat, images[list(golden)], [r["prompt"] for r in rows], rows).raw
    np.testing.assert_allclose(raw.numpy(), list(golden.values()), atol=1e-6)


def test_colors_are_computed_only_where_a_clause_asks(folders):
    asked = []
    reward = GenEval(**folders)
    scene = [("cup", LEFT, 0.9, "green"), ("dog", RIGHT, 0.9, "orange"), ("zebra", (100, 5, 140, 45), 0.9, "red")]
    reward.detector.model = Told([scene], SIZE)
    model, look = reward.detector.colors.model, reward.detector.colors.model.get_image_features
    model.get_image_features = lambda pixels: asked.append(len(pixels)) or look(pixels)
    image = draw(scene, SIZE)[None]
    score(reward, image, [""], [row("two_object", thing("cup"), thing("dog"))])
    assert asked == []
    score(reward, image, [""], [row("colors", thing("dog", color="orange"))])
    assert asked == [1]  # the dog, once, although two rules read its colour


def test_rows_that_cannot_be_scored(folders):
    reward = GenEval(**folders)
    image = np.zeros((1, 32, 32, 3), np.uint8)
    for clause, message in [
        (thing("remote"), "prompt 'a photo, colors': unknown class 'remote': use one of vgpo.rewards.coco.COCO_CL"),
        (thing("dog", color="grey"), "unknown color 'grey': use one of vgpo.rewards.coco.COLOR_WORDS"),
    ]:
        with pytest.raises(RewardError, match=message):
            score(reward, image, ["a photo"], [row("colors", clause)])
    with pytest.raises(RewardError, match="unknown tag"):  # the rules' own checks still come first
        score(reward, image, ["a photo"], [{"tag": "remote"}])
    with pytest.raises(ValueError, match="unknown class 'mouse'"):
        check_names(row("counting", thing("dog", 2), exclude=[thing("mouse", 3)]))
    with pytest.raises(ValueError, match=r"images must be a uint8 numpy array .*float64 \(1, 2, 2, 3\)"):
        reward.detector(np.zeros((1, 2, 2, 3)))


def test_options_and_version(folders, tmp_path):
    reward = GenEval(**folders, threshold=0.4, counting_threshold=0.2, max_per_class=3)
    assert (reward.threshold, reward.counting_threshold, reward.max_per_class, reward.closed) == (0.4, 0.2, 3, False)
    assert reward.detector.min_score == 0.2 and reward.name == "GenEval"
    default = GenEval(**folders)
    assert (default.threshold, default.counting_threshold, default.max_per_class) == (0.3, 0.9, 16)
    assert default.version == reward.version and "\n" not in reward.version
    for part in (
        "GenEval's rules over Mask2Former mask2former sha256 ",
        "CLIP clip sha256 ",
        "in float32, transformers ",
    ):
        assert part in reward.version
    other = shutil.copytree(folders["clip_weights"], tmp_path / "clip")  # the same name, other weights
    model = CLIPModel.from_pretrained(other)
    model.logit_scale.data += 1
    model.save_pretrained(other)
    changed = GenEval(weights=folders["weights"], clip_weights=str(other))
    assert changed.version != reward.version
    with pytest.raises(ValueError, match="GenEval.batch_size is 0; it must be a number v with v>0"):
        GenEval(**folders, batch_size=0)
    with pytest.raises(TypeError, match="colour"):
        GenEval(**folders, colour=True)
    tiny_mask2former(num_labels=133).save_pretrained(tmp_path / "panoptic")
    with pytest.raises(ValueError, match="panoptic knows 133 classes, not COCO's 80: use a '...-coco-instance' check"):
        GenEval(weights=str(tmp_path / "panoptic"), clip_weights=folders["clip_weights"])
    with pytest.raises(ValueError, match="GenEval.dtype is 'half'; it must be one of 'float32', 'bfloat16', 'float16'"):
        GenEval(**folders, dtype="half")


def test_incomplete_weights_are_refused(folders, tmp_path):
    with pytest.raises(OSError, match="cannot load weights '.*nowhere'.*check the name and the connection"):
        load_mask2former(str(tmp_path / "nowhere"))
    lame = shutil.copytree(folders["weights"], tmp_path / "lame")
    state = load_file(lame / "model.safetensors")
    del state["class_predictor.weight"]
    save_file(state, lame / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError,
        match="lame' do not fit the model: class_predictor.weight is missing; give those of a whole Mask2Former",
    ):
        load_mask2former(str(lame))
    state = load_file(folders["weights"] + "/model.safetensors")
    assert "criterion.empty_weight" in state  # a buffer of the training loss, which nobody needs here
    del state["criterion.empty_weight"]
    save_file(state, lame / "model.safetensors", metadata={"format": "pt"})
    assert load_mask2former(str(lame)).config.num_labels == 80


def test_hub_names_load_and_their_commits_are_recorded(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = {"weights": "facebook/tiny", "clip_weights": "openai/small"}
    for digit, (key, name) in zip("12", names.items(), strict=True):  # what a download leaves in the cache
        repo = tmp_path / f"models--{name.replace('/', '--')}"
        shutil.copytree(folders[key], repo / "snapshots" / (digit * 40))
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(digit * 40)
    version = GenEval(**names).version
    assert f"Mask2Former facebook/tiny@{'1' * 12}, CLIP openai/small@{'2' * 12} in float32" in version


def test_masks_of_a_wide_picture_do_not_leak_from_the_padding():
    padded, resized, size = (32, 64), (32, 40), (16, 20)
    masks = torch.full((1, 8, 16), -5.0)
    masks[:, :, 10:] = 5.0  # lies in the padding alone: cells 10 to 15 are columns 40 to 63
    classes = torch.zeros(1, 81)
    classes[0, 3] = 12
    scores, _, found = find_instances(classes, masks, padded, resized, size)
    edge = F.interpolate(masks[None], padded, mode="bilinear", align_corners=False)[0, 0, :, :40] > 0
    assert found.sum() == 0 and len(scores) == 0 and not edge.any()
