"""Two-stage adaptation: `train_index` fits the index, `distill` mends the model around it;
`calibrate` fits the sparse prefill to other lengths."""

from rtpurbo.adapt.calibrate import calibrate
from rtpurbo.adapt.loop import TrainResult
from rtpurbo.adapt.stage1 import train_index
from rtpurbo.adapt.stage2 import distill

__all__ = ["TrainResult", "calibrate", "distill", "train_index"]
