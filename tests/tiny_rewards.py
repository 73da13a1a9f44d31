"Rewards for tests, named `tiny_rewards:function` on a command line."

import numpy as np


def brightness(images, prompts, metadata):
    "Mean brightness: a score that any model can learn to raise."
    return images.reshape(len(images), -1).mean(1) / 255


def power(images, prompts, metadata, exponent=3):
    "A power of the mean brightness, which wants bright images more than not too dark ones."
    return brightness(images, prompts, metadata) ** exponent


def broken(images, prompts, metadata):
    "A reward that fails."
    raise RuntimeError("the reward is out")


def not_a_number(images, prompts, metadata):
    "A reward whose second score is NaN."
    scores = brightness(images, prompts, metadata)
    return np.where(np.arange(len(scores)) == 1, np.nan, scores)
