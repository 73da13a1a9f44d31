"A reward: how dark an image is."

from dataclasses import dataclass

import torch
from jsonargparse.typing import PositiveFloat

from vgpo.rewards.base import Reward, Scores


@dataclass
class Darkness(Reward):
    "One minus the mean brightness, to a power."

    power: PositiveFloat = 1.0
    """1 is linear"""

    name, scale, version = "darkness", "already in [0, 1]", "1"

    def __call__(self, images, prompts, metadata):
        raw = torch.from_numpy(1 - images.reshape(len(images), -1).mean(1) / 255).float() ** self.power
        return Scores(raw, raw, details=[{} for _ in prompts])
