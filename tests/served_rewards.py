"Rewards for servers in tests, named `served_rewards:function` on a command line."

import time

import tiny_rewards


def unhurried(images, prompts, metadata):
    "Mean brightness, after a while: a run with it can be caught in the middle."
    time.sleep(0.2)
    return tiny_rewards.brightness(images, prompts, metadata)
