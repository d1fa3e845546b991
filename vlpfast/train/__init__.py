"""Training: configuration, loop, checkpoints. `vlpfast.train.run.train(config)` does it all."""

from vlpfast.train.config import OptimConfig, RunConfig, TrainConfig

__all__ = ["OptimConfig", "RunConfig", "TrainConfig"]
