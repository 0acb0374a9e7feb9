"""Small trainings, and comparisons of two of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn import ImageSource, StreamingModel, TensorSource
from streamcnn.geometry.regions import Region
from streamcnn.training import Trainer, TrainSettings, read_log
from streamcnn.training.checkpoints import CheckpointFolder

SIZE = (40, 36)


class Images:
    """Random images of three classes, whose means tell them apart."""

    def __init__(self, count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.labels = tuple(position % 3 for position in range(count))
        draw = torch.Generator().manual_seed(seed)
        self.pixels = [torch.randn(1, *SIZE, generator=draw, dtype=dtype) + label for label in self.labels]
        self.fingerprint = f"{count} images of seed {seed}"
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def prefetch(self, position: int) -> None:
        assert 0 <= position < len(self)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[ImageSource, int]:
        return TensorSource(self.pixels[position]), self.labels[position]


def make_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


class ImagesWithNumbers(Images):
    """Images that look alike, each with a number that tells classes apart and one that does not."""

    def __init__(self, count: int, seed: int = 0, width: int = 2) -> None:
        super().__init__(count, seed)
        self.pixels = [torch.zeros_like(each) for each in self.pixels]
        self.width = width

    def __getitem__(self, position: int) -> tuple[ImageSource, int, Tensor]:  # type: ignore[override]
        source, label = super().__getitem__(position)
        return source, label, torch.tensor([label - 1.0, *[0.5] * (self.width - 1)])


class WithNumbers(nn.Module):
    """A model that also takes two numbers with each image."""

    def __init__(self) -> None:
        super().__init__()
        self.features = make_net()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        found: Tensor = self.head(torch.cat((self.features(x), numbers), 1))
        return found


def make_trainer_with_numbers(folder: Path, *, streamed: bool = True, **changes: Any) -> Trainer:
    torch.manual_seed(2)
    net = WithNumbers()
    net.features[3] = nn.Identity()
    values: dict[str, Any] = {
        "epochs": 6,
        "batch_size": 2,
        "accumulate": 2,
        "learning_rate": 0.1,
        "save_every": 2,
        **changes,
    }
    return Trainer(
        StreamingModel(net, tile=20) if streamed else OnTensors(net),
        ImagesWithNumbers(14),
        ImagesWithNumbers(5, seed=1),
        TrainSettings(**values),
        folder,
    )


class OnTensors(nn.Module):
    """A model in plain PyTorch on whole images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, sources: Sequence[ImageSource], *inputs: Tensor) -> Tensor:
        whole = Region.whole(SIZE)
        logits: Tensor = self.net(torch.stack([source.read(whole) for source in sources]), *inputs)
        return logits


@cache
def shared_model() -> StreamingModel:
    return StreamingModel(make_net(), tile=20)


def fresh_model() -> StreamingModel:
    """A model as new, except that it knows its plans: capturing anew takes most of a short run's time."""
    # Captured passes hold in one environment, and pytest makes the test's name a part of that.
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    model = shared_model()
    model.load_state_dict(make_net().state_dict())
    model.zero_grad(set_to_none=True)
    model.train()
    model.budget, model.last_report = None, None
    return model


def make_trainer(folder: Path, net: nn.Module | None = None, **changes: Any) -> Trainer:
    values: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 2,
        "accumulate": 2,
        "schedule": "ExponentialLR",
        "schedule_options": {"gamma": 0.9},
        "ema_decay": 0.9,
        "clip_norm": 1.0,
        "save_every": 2,
        **changes,
    }
    model = fresh_model() if net is None else StreamingModel(net, tile=20)
    return Trainer(
        model, Images(14), Images(5, seed=1), TrainSettings(**values), folder, identity={"model": "small"}
    )


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def final_state(folder: Path) -> dict[str, Any]:
    """The last checkpoint without values that depend on times and on the number of saves."""
    state = CheckpointFolder(folder / "checkpoints").newest()
    assert state is not None
    del state["log_bytes"]
    best = state["progress"]["best"]
    state["progress"]["best"] = best and best.partition("-update-")[2]
    return state


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    """Assert that every number and every bit is the same."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_equal(found[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_equal(one, other, f"{where}[{index}]")
    else:
        assert found == expected, where


def log_without_times(folder: Path) -> list[dict[str, Any]]:
    left_out = ("seconds", "megapixels_per_second", "measured_bytes")
    return [{k: v for k, v in line.items() if k not in left_out} for line in read_log(folder)]
