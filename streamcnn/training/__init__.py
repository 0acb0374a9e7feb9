"""Training of classifiers on whole images, with checkpoints from which a run goes on exactly."""

from __future__ import annotations

from streamcnn.training.evaluation import Score as Score
from streamcnn.training.evaluation import score as score
from streamcnn.training.log import read_log as read_log
from streamcnn.training.settings import TrainSettings as TrainSettings
from streamcnn.training.trainer import Terminated as Terminated
from streamcnn.training.trainer import Trainer as Trainer
from streamcnn.training.trainer import TrainResult as TrainResult
