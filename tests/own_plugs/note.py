"A callback: writes a line per epoch into a file, and counts over restarts."

from dataclasses import dataclass
from pathlib import Path

from vgpo.callback import Callback


@dataclass
class Note(Callback):
    "A line per epoch."

    file: str = "note.txt"
    """where to"""

    def __post_init__(self):
        self.epochs = 0

    def after_epoch(self, trainer):
        self.epochs += 1
        trainer.metrics["noted"] = self.epochs
        with open(Path(self.file), "a") as file:
            file.write(f"{self.epochs}: {trainer.metrics['reward']:.3f}\n")

    def state(self):
        return {"epochs": self.epochs}

    def load_state(self, state):
        self.epochs = state["epochs"]
