"An estimator of credit: a step earns what its reward gains on that of the state before."

from dataclasses import dataclass

from jsonargparse.typing import PositiveFloat

from vgpo.advantages import group_relative
from vgpo.credit.base import Credit
from vgpo.plugs import check_fields


@dataclass
class StepGains(Credit):
    "Advantages of gains, normalised within the group step by step."

    eps: PositiveFloat = 1e-4
    """added to the standard deviation of a group's gains"""

    def __post_init__(self):
        check_fields(self)

    def scored_states(self, num_steps):
        return list(range(num_steps + 1))

    def __call__(self, rewards, group):
        return group_relative(rewards.diff(dim=1), group, eps=self.eps)
