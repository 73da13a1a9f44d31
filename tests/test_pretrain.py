"Pretraining: its data keep the held-out prompts out, its captions lie as told, and it is reproducible."

from collections import Counter

import torch
from safetensors.torch import load_file

from vgpo.policies.loading import load_pipeline
from vgpo.prompts.files import load_prompts
from vgpo.world.pretrain import MAX_TOKENS, make_tokenizer, mislabel, pretrain, training_images


def test_no_held_out_prompt_occurs_and_every_caption_fits():
    images, rows = training_images(scenes=3000, words=3000, seed=3)
    assert images.shape == (6000, 32, 32, 3) and len(rows) == 6000
    held_out = {row["prompt"] for source in ("tiny-scenes", "tiny-words") for row in load_prompts(source, "test")}
    words = {row["target"] for row in load_prompts("tiny-words", "test")}
    assert not held_out & {row["prompt"] for row in rows} and not words & {row.get("target") for row in rows}
    tokenizer = make_tokenizer()
    assert max(len(tokenizer(prompt).input_ids) for prompt in held_out | {row["prompt"] for row in rows}) <= MAX_TOKENS


def test_mislabelled_captions_are_exchanged_within_their_task():
    _, rows = training_images(scenes=3000, words=1000, seed=1)
    told = mislabel(rows, 0.4, 0.4)
    tags = {row["prompt"]: row["tag"] for row in rows}
    assert Counter(told) == Counter(row["prompt"] for row in rows)
    assert sum(tags[caption] != row["tag"] for caption, row in zip(told, rows, strict=True)) <= 7  # one a task's end
    wrong = sum(caption != row["prompt"] for caption, row in zip(told, rows, strict=True)) / len(rows)
    assert 0.33 < wrong < 0.42  # 0.4, four standard errors are 0.03, and some captions are exchanged for their equals
    assert mislabel(rows, 0, 0) == [row["prompt"] for row in rows] and mislabel(rows, 0.4, 0.4) == told


def test_pretraining_is_reproducible_and_diffusers_loads_it(tmp_path):
    sizes = dict(scenes=96, words=32, autoencoder_steps=2, decoder_steps=2, flow_steps=2, mislabeled_steps=1)
    first = pretrain(tmp_path / "a", **sizes)
    pretrain(tmp_path / "b", **sizes)
    file = "transformer/diffusion_pytorch_model.safetensors"
    a, b = load_file(tmp_path / "a" / file), load_file(tmp_path / "b" / file)
    assert all(torch.equal(a[key], b[key]) for key in a)
    pipe = load_pipeline(str(tmp_path / "a"))
    assert pipe.vae.config.scaling_factor == first.vae.config.scaling_factor != 1
    assert pipe.text_encoder_3 is None and pipe.scheduler.config.shift == 3
