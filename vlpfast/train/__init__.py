"""Training: configuration of a run, the loop, checkpoints. `train(config)` is the whole of it."""

from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig, from_dict, to_dict

__all__ = ["OptimConfig", "RunConfig", "TrainConfig", "from_dict", "to_dict"]
