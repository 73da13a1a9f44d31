"What processes agree on, one function after the other; tests/test_processes.py has whole runs."

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

import vgpo.distributed
from vgpo.distributed import (
    SHARED_ERRORS,
    all_gather_object,
    init_accelerator,
    raise_on_all_ranks,
    rank_indices,
)


@pytest.mark.parametrize("processes", range(1, 8))
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 24])
def test_every_row_is_shared_out_in_equal_shares(processes, count):
    shares = [rank_indices(SimpleNamespace(process_index=i, num_processes=processes), count) for i in range(processes)]
    assert {len(share) for share in shares} == {-(-count // processes)}  # as many: sharded networks are called in step
    assert sorted({number for share in shares for number in share}) == list(range(count))


def test_a_process_that_finds_no_others_does_not_train_alone(monkeypatch):
    init_accelerator(1.0)  # one process, as accelerate sees it from then on
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but this process found 1 and would train alone"):
        init_accelerator(1.0)


@pytest.mark.parametrize(
    "setting", [("MIXED_PRECISION", "bf16"), ("GRADIENT_ACCUMULATION_STEPS", "4"), ("DYNAMO_BACKEND", "EAGER")]
)
def test_what_a_launcher_adds_to_the_recipe_has_no_effect(setting):
    says = "print(a.mixed_precision, a.gradient_accumulation_steps, a.state.dynamo_plugin.backend.value)"
    command = [
        sys.executable,
        "-c",
        f"from vgpo.distributed import init_accelerator; a = init_accelerator(1.0); {says}",
    ]
    environment = os.environ | {f"ACCELERATE_{setting[0]}": setting[1]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["no", "1", "NO"], done.stdout


@pytest.mark.parametrize(
    "kind, refused", [("DEEPSPEED", True), ("FSDP", True), ("MULTI_GPU", False), ("MULTI_NPU", False)]
)
def test_engines_that_train_otherwise_are_refused_and_other_hardware_is_not(monkeypatch, kind, refused):
    found = SimpleNamespace(distributed_type=DistributedType[kind], num_processes=1)
    monkeypatch.setattr(vgpo.distributed, "Accelerator", lambda **options: found)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if refused:
        with pytest.raises(ValueError, match=f"the launcher asks for {kind}.*model.fsdp"):
            init_accelerator(1.0)
    else:
        assert init_accelerator(1.0) is found


def test_an_error_in_one_process_is_raised_in_all(tmp_path):
    "Shared errors are; what the first process decides reaches the others, and so does its failure to."
    program = tmp_path / "two.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("rank ")]
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert [line[7:] for line in lines if line.startswith(f"rank {rank} ")] == [
            "all is well",
            "RewardError the server is gone",
            "Stop ",
            "OSError no space",  # each raises its own first
            "gathered [0, 1]",
            "decided run-7",
            "FileExistsError run-7",
        ], done.stdout


PROGRAM = """
import sys
from vgpo.distributed import SHARED_ERRORS, Stop, all_gather_object, broadcast, init_accelerator, raise_on_all_ranks
from vgpo.rewards.base import RewardError

a = init_accelerator(reward_timeout=10)
def say(line): sys.stdout.write(f"rank {a.process_index} {line}\\n")  # in one piece: both write to one pipe
def fails(): raise FileExistsError("run-7")

for errors in ((None, None), (None, RewardError("the server is gone")), (None, Stop()), (OSError("no space"),) * 2):
    try:
        with raise_on_all_ranks(a):
            if errors[a.process_index]: raise errors[a.process_index]
        say("all is well")
    except SHARED_ERRORS as error: say(f"{type(error).__name__} {error}")
say(f"gathered {all_gather_object(a, a.process_index)}")
say(f"decided {broadcast(a, lambda: f'run-{7 + a.process_index}')}")
try: broadcast(a, fails)
except FileExistsError as error: say(f"FileExistsError {error}")
a.end_training()
"""


@pytest.mark.parametrize("error", SHARED_ERRORS)
def test_one_process_raises_what_it_raised_itself(error):
    accelerator = SimpleNamespace(num_processes=1, is_main_process=True)
    assert all_gather_object(accelerator, "part") == ["part"]
    with pytest.raises(error), raise_on_all_ranks(accelerator):
        raise error("why")
    with pytest.raises(KeyError), raise_on_all_ranks(accelerator):  # a bug is not shared: it ends its process
        raise KeyError("why")
