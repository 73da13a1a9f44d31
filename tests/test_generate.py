"Images with names and seeds, and the proof that plain diffusers draws the same ones."

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vgpo.generate import GenerateOptions, file_name, generate, main, save_images, seeded_noise
from vgpo.open_run import load_run
from vgpo.policies.base import load_policy
from vgpo.policies.loading import ModelConfig

PROMPTS = ["a photo of two red circles", 'a sign that says "CAT"']
PLAIN = """
import sys
import torch
from diffusers import StableDiffusion3Pipeline
model, lora, output, prompt, seed, guidance = sys.argv[1:]
pipe = StableDiffusion3Pipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None)
pipe.load_lora_weights(lora)
image = pipe(prompt, num_inference_steps=4, guidance_scale=float(guidance), max_sequence_length=0,
             generator=torch.Generator().manual_seed(int(seed))).images[0]
image.save(output)
assert not [name for name in sys.modules if name.split(".")[0] == "vgpo"]
"""


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_plain_diffusers_draws_the_same_image(trained, tiny_folder, tmp_path, guidance):
    "In a process of its own that never imports vgpo: the LoRA, the model and a seed are enough."
    main(["--run", str(trained[0]), "--num_images_per_prompt", "2", "--seed", "6", "--guidance_scale", str(guidance),
          "--output", str(tmp_path), *PROMPTS])  # fmt: skip
    plain = tmp_path / "plain.png"
    words = [tiny_folder, trained[0] / "lora", plain, PROMPTS[0], 7, guidance]
    subprocess.run([sys.executable, "-c", PLAIN, *map(str, words)], check=True, cwd=tmp_path)
    ours = pixels(tmp_path / file_name(0, PROMPTS[0], 1))
    policy = load_policy(ModelConfig(path=str(tiny_folder)))
    base = generate(policy, PROMPTS[:1], seed=7, num_inference_steps=4, guidance_scale=guidance)
    assert np.abs(ours - pixels(plain)).max() <= 1
    assert np.abs(ours - base[0]).max() > 1  # the LoRA matters, so agreeing without it would not do


def test_files_are_named_and_say_how_they_were_drawn(trained, tmp_path, capsys):
    main(["--run", str(trained[0]), "--seed", "3", "--num_images_per_prompt", "2", "--output", str(tmp_path), *PROMPTS])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "00-a-photo-of-two-red-circles-00.png", "00-a-photo-of-two-red-circles-01.png",
        "01-a-sign-that-says-cat-00.png", "01-a-sign-that-says-cat-01.png", "grid.png"]  # fmt: skip
    assert sorted(capsys.readouterr().out.split()) == sorted(str(tmp_path / name) for name in names)
    with Image.open(tmp_path / names[3]) as image:
        assert (image.info["prompt"], image.info["seed"], image.info["num_inference_steps"]) == (PROMPTS[1], "4", "4")


def test_an_image_does_not_depend_on_its_neighbours(trained):
    policy, _ = load_run(trained[0])
    many = generate(policy, PROMPTS, num_images_per_prompt=3, seed=0, num_inference_steps=3, batch_size=2)
    one = generate(policy, PROMPTS[1:], seed=2, num_inference_steps=3)
    assert many.shape == (6, 32, 32, 3) and np.abs(many[5].astype(int) - one[0].astype(int)).max() <= 1


def test_noise_is_that_of_a_seeded_generator():
    expected = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(12))
    assert (seeded_noise((2, 3), 10, 4)[2:3] == expected).all()


@pytest.mark.parametrize(("prompt", "name"), [
    ("../../etc/passwd", "00-etc-passwd-00.png"), ("!?", "00-image-00.png"), ("Ünï code", "00-ünï-code-00.png"),
    (r"$$5 \frac{1}{0} 100%s", "00-5-frac-1-0-100-s-00.png"), ("\0/\n\\", "00-image-00.png"),
    ("x" * 999, f"00-{'x' * 40}-00.png"), ("a_b  c\n", "00-a-b-c-00.png")])  # fmt: skip
def test_file_names_are_safe(prompt, name):
    assert file_name(0, prompt, 0) == name


def test_odd_prompts_are_drawn_named_and_written_down(tmp_path):
    prompts = [r"a price of $$5 and \frac{1}{0}_{", "100% of %s ../x", "$\\alpha", "зелёный"]
    images = np.zeros((8, 4, 4, 3), np.uint8)
    paths = save_images(images, prompts, 2, tmp_path, {"seed": 5, "model": "m"})
    assert len(set(paths)) == 8 and {path.parent for path in paths} == {tmp_path} and (tmp_path / "grid.png").is_file()
    for n, path in enumerate(paths):
        with Image.open(path) as image:
            assert (image.info["prompt"], image.info["seed"], image.info["model"]) == (
                prompts[n // 2],
                str(5 + n % 2),
                "m",
            )


@pytest.mark.parametrize(("words", "message"), [
    (["a circle"], "nothing to draw with; give --run RUN or --model MODEL"),
    (["--model", "tiny", "  "], "a prompt is empty"),
    (["--model", "tiny", "--num_images_per_prompt", "0", "a"], "--num_images_per_prompt is 0; it must be at least 1"),
    (["--model", "tiny", "--num_inference_steps", "0", "a"], "--num_inference_steps is 0; it must be at least 1"),
    (["--model", "tiny", "--guidance_scale", "-1", "a"], "--guidance_scale is -1.0; it must not be negative"),
    (["--model", "tiny", "--images", "2", "a"], "there is no option images; --help lists all of them"),
    (["--model", "tiny", "--seed", "x", "a"], "seed"),
    (["--run", "absent", "a"], "absent is not a run: it has no config.yaml"),
])  # fmt: skip
def test_bad_command_lines_end_in_one_line(words, message):
    with pytest.raises(SystemExit) as stop:
        main(words)
    text = str(stop.value)
    assert text.startswith("error: ") and message in text and "\n" not in text


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in GenerateOptions.__dataclass_fields__:
        assert f"--{name}" in text or name == "prompts"
    for words in (
        "what to draw, each in quotes",
        "image i of each prompt starts from the noise of seed + i",
        "default: 1",
    ):
        assert words in text
