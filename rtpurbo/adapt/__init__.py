"""Two-stage adaptation: `train_index` fits the index, `distill` mends the model around it."""

from rtpurbo.adapt.loop import TrainResult
from rtpurbo.adapt.stage1 import train_index
from rtpurbo.adapt.stage2 import distill

__all__ = ["TrainResult", "distill", "train_index"]
