"An objective: the policy gradient, without ratio and clip."

from dataclasses import dataclass
from functools import partial

from jsonargparse.typing import PositiveFloat

from vgpo.objectives.base import Objective
from vgpo.rollout import column, replay


@dataclass
class Reinforce(Objective):
    "REINFORCE."

    scale: PositiveFloat = 1.0
    """of the loss"""

    def loss(self, policy, batch, step, sampler):
        replayed = replay(partial(policy.velocity, embeds=batch.embeds), batch.path, step, sampler)
        log_prob = replayed.log_prob(column(batch.path.latents, step + 1))
        loss = -self.scale * (column(batch.advantages, step) * log_prob).mean()
        return loss, {"log_prob": log_prob.mean()}
