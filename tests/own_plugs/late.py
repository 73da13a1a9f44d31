"A sampler: the SDE of constant noise, with the more noise the cleaner the state."

from dataclasses import dataclass

import torch

from vgpo.flow import match_dims
from vgpo.sde import Sampler, sde_step


@dataclass(frozen=True)
class LateSDE(Sampler):
    "Constant noise times 1 + rise * (1 - sigma)."

    noise_level: float = 0.3
    """eta at sigma 1"""
    rise: float = 1.0
    """how much more noise there is at sigma 0"""

    def transition(self, x, velocity, sigma, sigma_next, sigma_max):
        sigma, sigma_next = match_dims(sigma, x), match_dims(sigma_next, x)
        return sde_step(
            x, velocity, sigma, sigma_next, self.noise_level * (1 + self.rise * (1 - sigma)) * torch.ones_like(sigma)
        )
