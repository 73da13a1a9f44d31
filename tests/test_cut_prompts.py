"Prompts that are longer than the text encoders read are named before they are used."

import re

import pytest
import tiny_pipelines as tiny
import torch

from vgpo.evaluate import main as evaluate
from vgpo.generate import main as generate
from vgpo.policies.base import policy_classes
from vgpo.policies.loading import ModelConfig
from vgpo.prompts.files import load_prompts
from vgpo.train import main as train

FAMILIES = {  # the pipeline, max_sequence_length, and by which encoders how many tokens are read
    "sd3": (tiny.tiny_sd3, 30, {"text_encoder": 13, "text_encoder_2": 13, "text_encoder_3": 30}),
    "flux": (tiny.tiny_flux, 30, {"text_encoder": 13, "text_encoder_2": 30}),
    "qwen": (tiny.tiny_qwen_image, 20, {"text_encoder": 20}),
    "z_image": (tiny.tiny_z_image, 40, {"text_encoder": 40}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    "A policy of a family, and the tokens that its encoders read."
    make, length, most = FAMILIES[request.param]
    pipe = make()
    model = ModelConfig(resolution=16 if request.param in ("sd3", "flux") else 32, max_sequence_length=length)
    return policy_classes()[type(pipe).__name__](pipe, model), most


def same(policy, first, second):
    "Whether the network is told the same about two prompts."
    a, b = policy.encode([first]), policy.encode([second])
    parts = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and x.dtype.is_floating_point]
    return all(x.shape == y.shape and torch.allclose(x, y, atol=1e-6) for x, y in parts)


def row(prompt):
    return {"prompt": prompt}


def test_two_prompts_are_named_as_the_same_if_the_network_is_told_the_same(family):
    policy, most = family
    seen = set()
    for words in (1, 4, 7, 8, 9, 10, 11, 12, 13, 20, 25, 26, 27, 28, 29, 30, 31, 40):
        first, second = ("red " * words + end for end in ("circle", "square"))
        cut, alike = policy.cut_prompts([first, "a cat", second])
        assert alike == ([[0, 2]] if same(policy, first, second) else [])
        seen.add(bool(alike))
        assert all(set(found) <= {0, 2} for found in cut.values()) and (not alike or set(cut) == set(most))
    assert seen == {False, True}


def test_the_line_says_how_many_by_which_encoder_and_the_first(family):
    policy, most = family
    assert policy.cut_note([]) is policy.cut_note([row("a cat"), row("")]) is None
    long = "red circle " * 60
    note = policy.cut_note([row("a cat"), row(long + "one"), row(long + "two"), row(long + "two"), row("two")])
    assert note.startswith("note: 2 of 4 prompts are longer than the text encoders read, and are cut: 2 at the ")
    assert re.findall(r"2 at the (\d+) tokens of (\w+)", note) == [(str(n), name) for name, n in most.items()]
    assert "the first is 'red circle red" in note and "... " in note
    assert "2 are the same as another one after the cut" in note and "\n" not in note
    assert note.endswith("; shorten them, or raise model.max_sequence_length")


def test_without_t5_only_clip_counts(tiny_folder, policy):
    assert "text_encoder_3" not in policy.cut_note([row("red " * 30)])
    assert policy.cut_note([row("red " * 30)]).endswith("; shorten them")  # a longer max_sequence_length is no remedy
    assert policy.cut_note([row("red " * 11)]) is None and policy.cut_note([row("red " * 12)])


def test_case_and_spaces_that_a_tokenizer_ignores_are_no_cut(policy):
    assert policy.cut_note([row("a red circle"), row("A  Red circle")]) is None
    long = "a red circle and " * 5
    assert policy.cut_prompts([long + "a cross", "a cat", long.upper()])[1] == [[0, 2]]


def test_encoders_that_were_freed_are_remembered(tiny_folder):
    from vgpo.policies.base import load_policy

    policy = load_policy(ModelConfig(path=str(tiny_folder), precompute_text_embeds=True))
    policy.precompute(["a cat"])
    assert policy.pipe.text_encoder is None and "2 at the 13" in policy.cut_note([row("red " * 20), row("blue " * 20)])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("a cat\n\n" + "\n".join(f"{'a red circle and ' * 6}{end}" for end in ("a cross", "a square")))
    return path


def said(capfd):
    "The lines about cut prompts on the terminal."
    out, err = capfd.readouterr()
    assert "longer than" not in out
    return [line for line in err.split("\n") if "longer than the text encoders read" in line]


SMALL = [
    *("--rollout.prompts_per_epoch=2", "--rollout.group_size=2", "--rollout.num_inference_steps=2", "--window.size=1"),
    *("--credit.num_scored_steps=2", "--optim.num_minibatches=1", "--rollout.micro_batch_size=4", "--epochs=1"),
    *("--evaluation.num_samples=2", "--evaluation.num_inference_steps=1", "--reward=tiny_rewards:brightness"),
]


def test_the_programs_say_it_once_and_at_the_start(tiny_folder, tmp_path, file, capfd):
    where = [f"--model.path={tiny_folder}", f"--output_dir={tmp_path}"]
    train([*SMALL, *where, f"--prompts.train={file}", f"--prompts.test={file}"])
    (line,) = said(capfd)
    assert "2 of 3 prompts" in line and f"the first is {file}, line 3; 2 are the same" in line
    assert f"such as {file}, line 3 and {file}, line 4, and count" in line
    options = ["--prompts", str(file), "--num_samples", "3", "--num_inference_steps", "1"]
    options += ["--rewards", "tiny_rewards:brightness", "--output", str(tmp_path / "out")]
    evaluate([str(tiny_folder), *options])
    assert len(said(capfd)) == 1
    evaluate([str(tiny_folder), *options])
    assert said(capfd) == []  # nothing is drawn any more
    prompts = [row["prompt"] for row in load_prompts(file, "test")]
    options = ["--model", str(tiny_folder), "--num_inference_steps", "1", "--output", str(tmp_path / "generated")]
    generate([*options, *prompts])
    (line,) = said(capfd)
    assert "2 of 3 prompts" in line
    generate([*options, "a cat"])
    assert said(capfd) == []
