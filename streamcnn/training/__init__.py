"""Training on whole images, with checkpoints from which a run resumes exactly."""

from __future__ import annotations

from streamcnn.support.signals import StoppedAtOnce as StoppedAtOnce
from streamcnn.training.classification import Classification as Classification
from streamcnn.training.config import RunConfig as RunConfig
from streamcnn.training.ending import Terminated as Terminated
from streamcnn.training.evaluation import Score as Score
from streamcnn.training.evaluation import score as score
from streamcnn.training.log import read_log as read_log
from streamcnn.training.progress import TrainResult as TrainResult
from streamcnn.training.records import Listener as Listener
from streamcnn.training.report import write_report as write_report
from streamcnn.training.runs import TrainedRun as TrainedRun
from streamcnn.training.runs import load_run as load_run
from streamcnn.training.runs import make_trainer as make_trainer
from streamcnn.training.segmentation import Segmentation as Segmentation
from streamcnn.training.segmentation import Segmented as Segmented
from streamcnn.training.segmentation_loss import SegmentationLoss as SegmentationLoss
from streamcnn.training.settings import TrainSettings as TrainSettings
from streamcnn.training.task import Task as Task
from streamcnn.training.trainer import Trainer as Trainer
