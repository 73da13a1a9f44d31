"""Scenes that the tiny model mostly gets right, and a reward of 0 or 1: for the study's part `collapse`."""

from functools import lru_cache

import torch

from vgpo.prompts.files import load_prompts
from vgpo.world.detector import GenEvalShapes

EASY = ("colors", "position")  # with guidance 3 the base model is right in about nine of ten


@lru_cache
def judge():
    "GenEval's rules, made once."
    return GenEvalShapes()


def scenes(split, count=None):
    "`count` (500) rows of the tiny world's scenes, of the easy tasks."
    rows = [row for row in load_prompts("tiny-scenes", split) if row["tag"] in EASY]
    return rows[: count or 500]


def right(images, prompts, metadata):
    "1 where GenEval's official rule is satisfied, else 0."
    return judge()(images, prompts, metadata).strict.to(torch.float32)
