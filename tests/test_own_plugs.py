"A package outside of vgpo brings one plug of each kind, a file each: chosen, explained, refused and trained with."

import json

import pytest
import torch
import yaml
from own_plugs.gains import StepGains

from vgpo.config import parse_config
from vgpo.train import main

PLUGS = {  # option: (class, an option of its own, another value, what its help says)
    "sampler": ("own_plugs.late.LateSDE", "rise", 0.5, "how much more noise"),
    "credit": ("own_plugs.gains.StepGains", "eps", 1e-3, "added to the standard deviation"),
    "objective": ("own_plugs.reinforce.Reinforce", "scale", 2.0, "of the loss"),
    "reward": ("own_plugs.darkness.Darkness", "power", 2.0, "1 is linear"),
}
SMALL = [
    *("--rollout.prompts_per_epoch=2", "--rollout.group_size=2", "--rollout.num_inference_steps=3", "--window.size=2"),
    *(
        "--evaluation.num_samples=2",
        "--evaluation.num_inference_steps=1",
        "--optim.num_minibatches=1",
        "--save_every=1",
    ),
]


def chosen(option):
    "The class that a Config of the command line has for a plug, and that value of its option."
    path, name, value, _ = PLUGS[option]
    found = getattr(parse_config([f"--{option}={path}", f"--{option}.{name}={value}"]), option)
    if option == "reward":
        return found["class_path"], found["init_args"][name]
    return f"{type(found).__module__}.{type(found).__name__}", getattr(found, name)


@pytest.mark.parametrize("option", PLUGS)
def test_it_is_chosen_on_the_command_line_with_its_own_option(option):
    assert chosen(option) == (PLUGS[option][0], PLUGS[option][2])


@pytest.mark.parametrize("option", PLUGS)
def test_it_explains_its_option(option, capsys):
    with pytest.raises(SystemExit):
        main([f"--{option}.help", PLUGS[option][0]])
    said = " ".join(capsys.readouterr().out.split())
    assert f"--{option}.{PLUGS[option][1]}" in said and PLUGS[option][3] in said


@pytest.mark.parametrize("option", PLUGS)
def test_an_option_that_it_does_not_have_is_refused(option):
    with pytest.raises(SystemExit, match=r"^error: .*gama") as error:
        main([f"--{option}={PLUGS[option][0]}", f"--{option}.gama=0.5"])
    assert "\n" not in str(error.value)


def test_a_value_out_of_its_range_is_refused():
    with pytest.raises(SystemExit, match="^error: .*eps"):
        main(["--credit=own_plugs.gains.StepGains", "--credit.eps=-1"])
    with pytest.raises(ValueError, match="StepGains.eps is -1"):
        StepGains(eps=-1)


def test_gains_sum_to_the_final_reward_minus_the_first():
    rewards, group = torch.rand(8, 5, dtype=torch.float64), torch.arange(2).repeat_interleave(4)
    advantages = StepGains()(rewards, group)
    for step in range(4):
        for g in range(2):
            gain = (rewards[:, step + 1] - rewards[:, step])[group == g]
            expected = (gain - gain.mean()) / (gain.std(correction=0) + 1e-4)
            torch.testing.assert_close(advantages[group == g, step], expected)


def test_all_of_them_train_by_a_recipe_and_resume(tiny_folder, tmp_path):
    plugs = {
        option: {"class_path": path, "init_args": {name: value}} for option, (path, name, value, _) in PLUGS.items()
    }
    note = {"class_path": "own_plugs.note.Note", "init_args": {"file": str(tmp_path / "note.txt")}}
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        yaml.safe_dump({"base": "tiny-geneval", "name": "own", "epochs": 1, "callbacks": [note], **plugs})
    )
    main(
        [
            f"--recipe={recipe}",
            f"--model.path={tiny_folder}",
            f"--output_dir={tmp_path}",
            *SMALL,
            "--optim.lr_scheduler=constant",
        ]
    )
    main(["--resume", str(tmp_path / "own"), "--epochs=2"])
    rows = [json.loads(line) for line in (tmp_path / "own" / "metrics.jsonl").read_text().splitlines()]
    assert [row["noted"] for row in rows] == [1, 2]  # what the callback adds is logged, and its count survives
    assert all("log_prob" in row and row["grad_norm"] > 0 for row in rows)
    assert len((tmp_path / "note.txt").read_text().splitlines()) == 2
    assert (tmp_path / "own" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert "darkness" in (tmp_path / "own" / "versions.json").read_text()
