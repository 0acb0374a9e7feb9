"""Settings of a run: which mean something, and that trying them out leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.normalisation import Normalise
from streamcnn.errors import RunMismatch, UnsupportedModel
from streamcnn.training import RunConfig, SegmentationLoss, TrainSettings
from streamcnn.training.settings import require_same


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs=0: allowed are 1 and more"),
        ({"learning_rate": 0}, "learning_rate=0: allowed are positive numbers"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0: allowed are positive numbers, or None"),
        ({"clip_norm": math.inf}, "clip_norm=inf: allowed are positive numbers, or None"),
        (
            {"optimizer_options": {"betas": [0.9, math.inf]}},
            "optimizer_options holds inf: allowed are finite",
        ),
        ({"ema_decay": 1.0}, "ema_decay=1.0: allowed are 0 and more, and less than 1"),
        ({"patience": 0}, "patience=0: allowed are 1 and more, or None"),
        ({"autocast": "int8"}, "autocast='int8': allowed are bfloat16, float16, or None"),
        ({"schedule_every": "day"}, "schedule_every='day': allowed are epoch and update"),
        ({"optimizer": "Adamm"}, "optimizer='Adamm': allowed are .*Adam, .*SGD"),
        ({"optimizer": "Optimizer"}, r"optimizer='Optimizer': allowed are (?!.*Optimizer)"),
        ({"schedule": "Optimizer"}, "schedule='Optimizer': allowed are .*ExponentialLR"),
        ({"schedule": "_LRScheduler"}, r"schedule='_LRScheduler': allowed are (?!.*LRScheduler)"),
        ({"optimizer_options": {"momentum": 0.9}}, "optimizer='Adam' with .*momentum.*unexpected keyword"),
        ({"optimizer": "LBFGS"}, "optimizer='LBFGS' with .*closure"),
        ({"optimizer": "SparseAdam"}, "optimizer='SparseAdam' with .*dense"),
        ({"schedule_options": {"gamma": 0.9}}, "schedule_options={'gamma': 0.9} without a schedule"),
        ({"schedule": "ExponentialLR"}, "schedule='ExponentialLR' with .*gamma"),
        ({"schedule": "ReduceLROnPlateau", "schedule_every": "update"}, "allowed is schedule_every='epoch'"),
    ],
)
def test_settings_without_meaning_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings(**values)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Normalise(mean=math.nan),
        lambda: Normalise(std=math.inf),
        lambda: RandomAugmentation(gains=(1, math.inf)),
        lambda: SegmentationLoss(name="dice", options={"smooth": math.inf}),
        lambda: RunConfig(model="resnet18", data="", model_options={"drop_rate": math.nan}),
    ],
    ids=["mean", "std", "gains", "loss", "model"],
)
def test_numbers_that_a_runs_file_cannot_hold_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"(nan|inf)\b.*: allowed (are|is) .*(finite|positive)"):
        make()


def test_a_model_without_anything_to_train_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no parameter of the model can be trained"):
        TrainSettings().make_optimizer(nn.Conv2d(1, 1, 3).requires_grad_(False))


def test_trying_settings_out_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    TrainSettings(optimizer="AdamW", schedule="CosineAnnealingLR", schedule_options={"T_max": 5})
    found = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(found, torch.rand(3))


@pytest.mark.parametrize("named", [{}, {"task": None}, {"task": "classification"}])
def test_a_run_of_another_task_is_told_by_that_alone(named: dict[str, Any]) -> None:
    classifier = {**named, "model": "resnet18", "batch_size": 2, "images": "content a"}
    segmenter = {"task": "segmentation", "model": "nets:unet", "batch_size": 1, "images": "content b"}
    with pytest.raises(RunMismatch) as refused:
        require_same(segmenter, classifier)
    assert str(refused.value) == (
        "the run cannot go on, since it is of the task classification, with the model resnet18, and this is "
        "the task segmentation: go on with what it began with, or begin another run in another folder"
    )
    with pytest.raises(RunMismatch, match="task segmentation, with the model nets:unet, and"):
        require_same(classifier, segmenter)
