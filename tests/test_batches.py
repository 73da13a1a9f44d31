"How the images of an epoch are shared out."

import pytest

from vgpo.batches import Batches, solve_batches


def test_every_process_gets_what_equation_1_says():
    for prompts, size, minibatches, batch, processes in (
        (48, 24, 2, 9, 8),
        (6, 10, 3, 4, 4),
        (5, 4, 1, 3, 2),
        (1, 2, 1, 9, 1),
    ):
        images = list(range(prompts * size))
        n = len(images) // minibatches
        shares = [images[m * n : (m + 1) * n][rank::processes] for m in range(minibatches) for rank in range(processes)]
        batches = solve_batches(prompts, size, minibatches, batch, processes)
        assert {len(share) for share in shares} == {batches.share}
        micro_batches = [len(shares[0][i : i + batch]) for i in range(0, len(shares[0]), batch)]
        assert batches.sizes == micro_batches
    assert "1152 images" in str(solve_batches(48, 24, 2, 9, 8)) and "8 of 9" in str(solve_batches(48, 24, 2, 9, 8))
    assert str(solve_batches(5, 4, 2, 4, 1)).endswith("2 of 4 and 1 of 2")


def test_what_does_not_divide_is_named_with_the_nearest_that_does():
    with pytest.raises(ValueError, match="48 x 24 = 1152, which 2 minibatches on 7 processes") as e:
        solve_batches(48, 24, 2, 9, 7)
    assert "rollout.prompts_per_epoch to 42 or 49" in str(e.value) and "rollout.group_size to 21 or 28" in str(e.value)
    for prompts, size in ((42, 24), (49, 24), (48, 21), (48, 28)):
        assert solve_batches(prompts, size, 2, 9, 7).share * 14 == prompts * size
    nothing_below = "rollout.prompts_per_epoch to 5, or rollout.group_size to 5"
    with pytest.raises(ValueError, match=nothing_below):
        solve_batches(1, 2, 5)


def test_a_partition_says_itself():
    batches = Batches(images=24, num_minibatches=2, processes=2, micro_batch_size=4)
    assert (batches.share, batches.sizes) == (6, [4, 2])
    said = "24 images per epoch, 12 in each of 2 processes; 2 minibatches of 12, 6 per process, in micro-batches: "
    assert str(batches) == said + "1 of 4 and 1 of 2"
    assert str(solve_batches(1, 2)) == (
        "2 images per epoch, 2 in each of 1 process; 1 minibatch of 2, 2 per process, in micro-batches: 2 of 1"
    )
