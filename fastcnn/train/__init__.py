"""Training: `train(TrainConfig(model="lenet5", data="digits"))`, and `load_run(folder)` to use what came out."""

from fastcnn.train.config import TrainConfig
from fastcnn.train.evaluate import Run, evaluate, load_run
from fastcnn.train.loop import train
from fastcnn.train.statistics import population_statistics

__all__ = ["Run", "TrainConfig", "evaluate", "load_run", "population_statistics", "train"]
