"""One row of the table: a method trained and scored under its ceiling, in a process of its own.

The budget counts from before the network is made, so weights, gradients and the optimiser's state are part of
it, and it holds in training and in inference. On the CPU the kernel refuses what goes past it; on a GPU
PyTorch's allocator is capped and NVML is read all through.
"""

from __future__ import annotations

import gc
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.classifiers import (
    LearnedResizer,
    PatchGD,
    TileVote,
    WholeImages,
    grid_size,
    leave_out_compiled_code,
    make_net,
)
from benchmarks.harness.detector import DetectorTrainer, DigitSums, ImagesWithDigits
from benchmarks.harness.images import ShrunkImages, read_whole, steps_to
from benchmarks.harness.method import Kind, Method, TrainingStage
from benchmarks.harness.scales import Scale
from benchmarks.record import device_name
from streamcnn import BudgetExceeded, PlanDoesNotFit, StreamingModel
from streamcnn.ceiling.device import Ceiling, Limit, ceiling_for
from streamcnn.ceiling.refusals import is_out_of_memory
from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.dataset import ImageDataset, LabelledImages, TileDataset
from streamcnn.data.normalisation import Normalise
from streamcnn.data.sampling import divide
from streamcnn.data.sources import ImageSource, TensorSource
from streamcnn.data.tile_store import TileStore
from streamcnn.data.ultramnist.layout import REFERENCE_SIZE
from streamcnn.errors import TrainingDiverged
from streamcnn.support.atomic import replace_file
from streamcnn.training import Terminated, Trainer, TrainSettings, score
from streamcnn.training.checkpoints import CheckpointFolder, load_checkpoint
from streamcnn.training.evaluation import require_metrics
from streamcnn.training.runs import best_weights

VALIDATION_SHARE = 0.1
PATIENCE = 10
"""Epochs without a better validation accuracy after which training ends."""
PLATEAU = 2
"""The same after which a schedule that looks for plateaus lowers the learning rate."""
UNKNOWN_BATCH = 4096
"""Where the search for the largest batch ends if nothing else ends it."""
LARGEST_TEST_BATCH = 8
CODE_BYTES = 2**24
"""Bytes of a streamed row's budget on the CPU that are left to library code which runs for the first time: it
is resident and no data, so the kernel's limit does not see it, and the peak does."""
HOST_SLACK = 3 * 2**23
"""Bytes of a streamed row's budget that are left to the interpreter between passes."""
ADAM_COPIES = 3
"""Weights, and the two averages that Adam keeps of each."""
FEATURES = 256
"""Width of a patch's feature vector in PatchGD."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be done."""

    method: Method
    scale: Scale
    budget: int
    """Bytes, for training and for inference."""
    seed: int
    pretrained: bool
    device: str
    images: Path
    """Tile store of the scale's images."""
    shrunk: Path
    """Folder for these images shrunk."""
    folder: Path
    """The row's own, for checkpoints."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The largest batch that an update can be made with, and how."""

    batch: int
    reuse_heap: bool
    """Whether the C library may keep freed blocks: faster, and more memory."""

    @property
    def heap(self) -> str:
        """For names."""
        return "reusing" if self.reuse_heap else "frugal"


class Refused(Exception):
    """The method does not fit its budget."""


AGAIN = "again"
"""The outcome of a process that another one is to go on after."""
SAVED = "saved"
"""The outcome of a process that was asked to end by SIGTERM, and has saved."""


class StartAgain(Exception):
    """The row is to go on in a new process."""


class Attempts:
    """What a row has tried, kept in a file: a library may end the process when memory is refused it.

    Parameters
    ----------
    folder
        The row's own.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "attempts.json"
        known = _read_json(self._path)
        self._refused: dict[str, str] = known.get("refused", {})
        self._tried: str | None = known.get("trying")

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """A block that may be refused, and is again if it was before.

        Raises
        ------
        Refused
            If it is.
        """
        if name in self._refused:
            raise Refused(self._refused[name])
        self._note(name)
        try:
            yield
        except Refused as error:
            self._refused[name] = str(error)
            raise
        finally:
            self._note(None)

    def refuse_last(self, reason: str) -> bool:
        """Have what a process was trying when it ended count as refused; False if it was trying nothing."""
        if self._tried is None:
            return False
        self._refused[self._tried] = reason
        self._note(None)
        return True

    def forget_last(self) -> None:
        """Have what a process was trying when it ended be tried again."""
        if self._tried is not None:
            self._note(None)

    def _note(self, trying: str | None) -> None:
        self._tried = trying
        _write_json(self._path, {"refused": self._refused, "trying": trying})


def _read_json(path: Path) -> dict[str, Any]:
    """What was written to a file; nothing if it is not there."""
    return json.loads(path.read_text()) if path.exists() else {}


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(value))


def run(task: Task) -> dict[str, Any]:
    """Train and score; what was found, or why the ceiling refused it, as JSON has it."""
    store = TileStore(task.images)
    _warm_up(store)
    found: dict[str, Any] = {
        "device": device_name(cpu=task.device == "cpu"),
        "digits": store.head.provenance["digits"],
        "versions": {name: version(name) for name in ("streamcnn", "timm", "torchvision", "numpy", "zarr")},
        "reason": None,
    }
    try:
        return {**found, "outcome": "finished", **_Row(task, store).run()}
    except StartAgain:
        return {"outcome": AGAIN}
    except Refused as error:
        return {**found, "outcome": "refused", "reason": str(error)}
    except TrainingDiverged as error:
        return {**found, "outcome": "diverged", "reason": str(error)}
    except Terminated as error:
        return {"outcome": SAVED, "reason": str(error)}


def _warm_up(store: TileStore) -> None:
    """Start threads, and load code that is loaded at its first use, some 150 MB: not the method's doing."""
    source, _ = TileDataset(store, "test")[0]
    read_whole(source)
    require_metrics()
    net = nn.Sequential(nn.Conv2d(source.shape[0], 2, 3), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1))
    for model in (StreamingModel(net, tile=64, preprocess=Normalise()), WholeImages(net)):
        optimizer = torch.optim.Adam(model.parameters())
        model([source]).sum().backward()
        optimizer.step()


class Costs:
    """What one stage of training takes, over all the processes that it takes.

    Parameters
    ----------
    folder
        The stage's own.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "costs.json"
        self._checkpoints = CheckpointFolder(folder / "checkpoints")
        self._newest = self._newest_checkpoint()
        self._started = time.perf_counter()
        known = _read_json(self._path)
        self._before: float = known.get("seconds", 0.0)
        self._saved: float = known.get("saved_seconds", 0.0)
        self._saved_before = self._saved
        self.seconds = self._before
        """Spent, what was lost with a process included."""
        self.trained_seconds = self._saved
        """What the weights have had: until the newest checkpoint, and since."""
        self.peak: int = known.get("peak", 0)
        """Bytes."""
        self.updates: int = known.get("updates", 0)
        self.epochs: float = known.get("epochs", 0.0)

    def note(self, limit: Limit, trainer: Trainer) -> None:
        """Write down what it has cost until now."""
        elapsed = time.perf_counter() - self._started
        self.seconds, self.trained_seconds = self._before + elapsed, self._saved_before + elapsed
        self.peak = max(self.peak, limit.peak_bytes or 0)
        self.updates = trainer.progress.update
        self.epochs = trainer.progress.epoch + trainer.progress.num_images / len(trainer.images)
        newest = self._newest_checkpoint()
        if newest != self._newest:
            self._newest, self._saved = newest, self.trained_seconds
        found = {"seconds": self.seconds, "saved_seconds": self._saved, "peak": self.peak}
        _write_json(self._path, {**found, "updates": self.updates, "epochs": self.epochs})

    def _newest_checkpoint(self) -> str | None:
        paths = self._checkpoints.paths()
        return paths[0].name if paths else None


class _Row:
    """A task, and what it has taken so far."""

    def __init__(self, task: Task, store: TileStore) -> None:
        self.task = task
        self.store = store
        self.ceiling: Ceiling = ceiling_for(torch.device(task.device))
        self.stages = task.method.stages or (
            TrainingStage(resolution=task.method.resolution or 0, learning_rate=0.0),
        )
        self.attempts = Attempts(task.folder)
        self.seconds = 0.0
        self.updates = 0
        self.epochs = 0.0
        self.peak = 0

    def run(self) -> dict[str, Any]:
        """All stages of training, and the test."""
        best: Path | None = None
        # All before the first is trained: a search may have the row start again.
        datasets = [self._datasets(stage) for stage in self.stages]
        fits = [self._fit(train) for train, _, _ in datasets]
        for number, (stage, fit) in enumerate(zip(self.stages, fits, strict=True)):
            train, validation, test = datasets[number]
            while True:
                folder = self.task.folder / f"stage-{number}-batch-{fit.batch}-{fit.heap}"
                try:
                    with self.attempts.trying(folder.name):
                        best, selected, reading = self._train(stage, fit, train, validation, folder, best)
                    break
                except Refused:
                    # The search has seen two updates alone, and no validation.
                    less = self._less(fit)
                    if less is None:
                        raise
                    fit = self._remembered(less, train)
        assert best is not None
        with self.attempts.trying("test"):
            tested = self._test(best, test, fit)
        return {
            **tested,
            "selected": selected,
            "training_reading": reading,
            **self._costs(),
        }

    def _costs(self) -> dict[str, Any]:
        return {
            "updates": self.updates,
            "epochs": round(self.epochs, 2),
            "training_seconds": round(self.seconds, 1),
            "training_peak_bytes": self.peak,
        }

    def _settings(self, stage: TrainingStage, fit: Fit) -> TrainSettings:
        method, scale = self.task.method, self.task.scale
        known = method.hyperparameters_for(self.task.budget)
        options = (
            {"gamma": scale.gamma or known.gamma}
            if method.schedule == "ExponentialLR"
            else {"patience": PLATEAU}
        )
        shrinks = method.kind is Kind.SHRINK
        return TrainSettings(
            epochs=(scale.epochs_when_shrunk if shrinks else None) or scale.epochs,
            batch_size=fit.batch,
            learning_rate=scale.learning_rate or stage.learning_rate or known.learning_rate,
            schedule=method.schedule,
            schedule_options=options,
            clip_norm=method.clip_norm,
            patience=PATIENCE,
            save_every=500,
            seed=self.task.seed,
        )

    # --- memory --------------------------------------------------------------------------------------

    @contextmanager
    def _limited(self, *, reuse_heap: bool) -> Iterator[Limit]:
        """A block under the ceiling, in which refused memory is `Refused`."""
        gc.collect()
        self.ceiling.empty_cache()
        try:
            with self.ceiling.limit(self.task.budget, reuse_heap=reuse_heap) as limit:
                yield limit
                self._check(limit)
        except (BudgetExceeded, PlanDoesNotFit) as error:
            raise Refused(_first_line(error)) from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise Refused(_first_line(error)) from error

    def _check(self, limit: Limit) -> None:
        """Refuse what the kernel's limit does not see: on the CPU, code that runs for the first time."""
        self.ceiling.check()
        if limit.peak_bytes is not None and limit.peak_bytes > self.task.budget:
            raise Refused(f"{limit.peak_bytes} bytes were held, and the budget is {self.task.budget}")

    def _fit(self, images: LabelledImages) -> Fit:
        """The largest batch under the ceiling, found once for a row.

        A streamed model takes as many pixels as its file says, if a plan for them fits: more cost time.
        """
        if known := _read_json(self._fit_path(images)):
            return Fit(**known)
        cap = self.task.scale.largest_batch or UNKNOWN_BATCH
        source = images[0][0]
        if self.task.method.is_streamed:
            with self._limited(reuse_heap=True):
                model = self._make_model(images)
                assert isinstance(model, StreamingModel)
                batch = self.task.method.hyperparameters_for(self.task.budget).batch or 1
                batch = min(cap, int(batch * (REFERENCE_SIZE / self.task.scale.canvas) ** 2))
                while batch > 1 and not model.train().plan((batch, *source.shape)).fits:
                    batch //= 2
            return Fit(_without_single(batch, len(images)), True)
        refusal = None
        for reuse_heap in (True, False):
            fit, refusal = self._largest(images, reuse_heap=reuse_heap)
            if fit is not None:
                return self._remembered(fit, images)
        raise Refused(f"updates with a single image: {refusal}")

    def _less(self, fit: Fit) -> Fit | None:
        """What to train with where ``fit`` was refused after all: a frugal heap, then fewer images."""
        if fit.reuse_heap and self.task.device == "cpu" and not self.task.method.is_streamed:
            return Fit(fit.batch, reuse_heap=False)
        return Fit(fit.batch * 3 // 4, fit.reuse_heap) if fit.batch > 1 else None

    def _fit_path(self, images: LabelledImages) -> Path:
        return self.task.folder / f"fit-{images[0][0].shape[1]}.json"

    def _remembered(self, fit: Fit, images: LabelledImages) -> Fit:
        """Have a row that is started again train like that.

        Raises
        ------
        StartAgain
            On the CPU, where memory that was refused has left holes in the heap.
        """
        fit = Fit(_without_single(fit.batch, len(images)), fit.reuse_heap)
        _write_json(self._fit_path(images), asdict(fit))
        if self.task.device == "cpu":
            raise StartAgain
        return fit

    def _largest(self, images: LabelledImages, *, reuse_heap: bool) -> tuple[Fit | None, str | None]:
        """The largest batch, by doubling, then halving the gap; or what refuses a single image."""
        cap = self.task.scale.largest_batch or UNKNOWN_BATCH

        def refusal(batch: int) -> str | None:
            return self._try(images, Fit(batch, reuse_heap))

        # Two first: batch norm of pooled features cannot be trained on one image.
        if (refused := refusal(2)) is not None:
            refused = refusal(1)
            return (Fit(1, reuse_heap), None) if refused is None else (None, refused)
        good, bad = 2, 4
        while bad <= cap and refusal(bad) is None:
            good, bad = bad, 2 * bad
        bad = min(bad, cap + 1)
        while bad - good > max(1, good // 8):
            middle = (good + bad) // 2
            if refusal(middle) is None:
                good = middle
            else:
                bad = middle
        return Fit(good, reuse_heap), None

    def _try(self, images: LabelledImages, fit: Fit) -> str | None:
        """Make two updates of a model of its own on blank images; what refused them, if anything did.

        The second has Adam's averages beside its activations, as all later ones have.
        """
        source = images[0][0]
        batch, name = fit.batch, f"update-{source.shape[1]}-batch-{fit.batch}-{fit.heap}"
        try:
            with self.attempts.trying(name), self._limited(reuse_heap=fit.reuse_heap):
                model = self._make_model(images).train()
                optimizer = torch.optim.Adam(model.parameters())
                sources = [TensorSource(torch.zeros(source.shape, dtype=source.dtype)) for _ in range(batch)]
                labels = torch.zeros(batch, dtype=torch.int64, device=self.task.device)
                for _ in range(2):
                    optimizer.zero_grad(set_to_none=True)
                    if isinstance(model, PatchGD):
                        model.begin(sources)
                    F.cross_entropy(model(sources), labels).backward()
                    optimizer.step()
        except Refused as error:
            return str(error)
        except ValueError as error:
            if batch > 1 or "more than 1 value per channel" not in str(error):
                raise
            return "batch norm cannot be trained on one image, and two do not fit"
        return None

    # --- training and test ---------------------------------------------------------------------------

    def _train(
        self,
        stage: TrainingStage,
        fit: Fit,
        images: LabelledImages,
        validation: LabelledImages,
        folder: Path,
        start: Path | None,
    ) -> tuple[Path, bool, str]:
        """One stage: a checkpoint, whether validation has chosen it, and which reading the peak is."""
        weights = None if start is None else best_weights(load_checkpoint(start))
        costs = Costs(folder)
        with self._limited(reuse_heap=fit.reuse_heap) as limit:
            model = self._make_model(images)
            if weights is not None:
                model.load_state_dict(weights)
                weights = None
            trainer = self._make_trainer(model, images, validation, self._settings(stage, fit), folder)
            trainer.listener = self._listener(trainer, costs, limit)
            # It may be: a row is started again for a later stage, or for the test.
            if not self._is_time_up(costs):
                try:
                    trainer.run()
                except Terminated:
                    # The checkpoint is newer than the last note.
                    costs.note(limit, trainer)
                    # Asked to by a signal, and not by the listener: the row is not done.
                    if not self._is_time_up(costs):
                        raise
                costs.note(limit, trainer)
            # What comes after has no need of them.
            del trainer
            model.zero_grad(set_to_none=True)
        self.seconds += costs.seconds
        self.updates += costs.updates
        self.epochs += costs.epochs
        self.peak = max(self.peak, costs.peak)
        checkpoints = CheckpointFolder(folder / "checkpoints")
        best = checkpoints.best()
        return best or checkpoints.paths()[0], best is not None, limit.reading

    def _make_trainer(
        self,
        model: nn.Module,
        images: LabelledImages,
        validation: LabelledImages,
        settings: TrainSettings,
        folder: Path,
    ) -> Trainer:
        task = self.task
        kinds = {PatchGD: PatchGDTrainer, TileVote: PiecesTrainer, DigitSums: DetectorTrainer}
        kind = kinds.get(type(model), Trainer)
        method = json.loads(json.dumps(asdict(task.method), default=lambda value: value.value))
        identity = {"method": method, "scale": task.scale.name, "row_budget": task.budget}
        return kind(model, images, validation, settings, folder, identity=identity)

    def _listener(
        self, trainer: Trainer, costs: Costs, limit: Limit
    ) -> Callable[[str, Mapping[str, Any]], None]:
        """What holds the peak against the budget after each update, and ends training when time is up."""

        def listen(kind: str, values: Mapping[str, Any]) -> None:
            self._check(limit)
            costs.note(limit, trainer)
            if kind == "update" and self._is_time_up(costs):
                trainer.end("the end of its time")

        return listen

    def _is_time_up(self, costs: Costs) -> bool:
        """Whether a stage has had its share of the scale's time."""
        seconds = self.task.scale.seconds
        return seconds is not None and costs.trained_seconds > seconds / len(self.stages)

    def _test(self, best: Path, images: LabelledImages, fit: Fit) -> dict[str, Any]:
        """The score of a checkpoint's weights on the test images."""
        started = time.perf_counter()
        weights = best_weights(load_checkpoint(best))
        with self._limited(reuse_heap=fit.reuse_heap) as limit:
            model = self._make_model(images)
            model.load_state_dict(weights)
            del weights
            found = score(
                model.eval(),
                images,
                batch_size=min(fit.batch, LARGEST_TEST_BATCH),
                before_batch=self.ceiling.check,
            )
        return {
            "test_accuracy": found.accuracy,
            "test_loss": found.loss,
            "batch_size": fit.batch,
            "reuse_heap": fit.reuse_heap,
            "resolution": images[0][0].shape[1],
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "inference_peak_bytes": limit.peak_bytes,
            "inference_reading": limit.reading,
            "test_seconds": round(time.perf_counter() - started, 1),
        }

    # --- data and model ------------------------------------------------------------------------------

    def _datasets(self, stage: TrainingStage) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
        """For training, for validation, and for the test."""
        task = self.task
        labels = TileDataset(self.store, "train").labels
        chosen, rest = divide(labels, share=VALIDATION_SHARE, seed=task.seed)
        augmentation = RandomAugmentation(inversion=task.method.inversion) if task.method.inversion else None

        def dataset(
            split: str, positions: tuple[int, ...] | None, drawn: RandomAugmentation | None = None
        ) -> ImageDataset:
            options = {"positions": positions, "augmentation": drawn, "seed": task.seed}
            if task.method.kind is not Kind.SHRINK:
                return TileDataset(self.store, split, **options)  # type: ignore[arg-type]
            steps = steps_to(stage.resolution, task.scale)
            return ShrunkImages(self.store, split, steps, task.shrunk, **options)  # type: ignore[arg-type]

        train: LabelledImages = dataset("train", chosen, augmentation)
        if task.method.kind is Kind.DETECTOR:
            assert isinstance(train, TileDataset)
            train = ImagesWithDigits(train)
        return train, dataset("train", rest), dataset("test", None)

    def _make_model(self, images: LabelledImages) -> nn.Module:
        """The method's classifier on the device, the same every time."""
        model = self._make_classifier(images)
        if self.task.device == "cpu" and not isinstance(model, StreamingModel):
            leave_out_compiled_code(model, self.ceiling.check)
        return model

    def _make_classifier(self, images: LabelledImages) -> nn.Module:
        task, method = self.task, self.task.method
        num_classes, size = task.scale.recipe.num_classes, images[0][0].shape[1]
        torch.manual_seed(task.seed)
        assert method.model is not None

        def net(size: int) -> nn.Module:
            assert method.model is not None
            return make_net(method.model, num_classes, size, pretrained=task.pretrained)

        if method.is_streamed:
            return self._streamed(net(size), DigitSums if method.kind is Kind.DETECTOR else StreamingModel)
        if method.kind is Kind.SHRINK:
            return WholeImages(net(size)).to(task.device)
        if method.kind is Kind.RESIZER:
            assert method.resolution is not None
            resolution = task.scale.pixels(method.resolution)
            return WholeImages(nn.Sequential(LearnedResizer(resolution), net(resolution))).to(task.device)
        assert method.tile is not None
        tile = task.scale.pixels(method.tile)
        if method.kind is Kind.TILES:
            return TileVote(net(tile), tile, method.share).to(task.device)
        assert method.kind is Kind.PATCHGD
        found = PatchGD(
            make_net(method.model, FEATURES, tile, pretrained=task.pretrained, hidden=None),
            tile,
            method.share,
            width=FEATURES,
            grid_size=grid_size(size, tile),
            num_classes=num_classes,
        )
        return found.to(task.device)

    def _streamed(self, net: nn.Module, model: type[StreamingModel]) -> StreamingModel:
        task, taken = self.task, 0
        if task.device == "cpu":
            # A pass counts from what there is when it begins; on a GPU it counts everything itself.
            taken = ADAM_COPIES * sum(p.nbytes for p in net.parameters()) + HOST_SLACK + CODE_BYTES
        if taken >= task.budget:
            raise Refused(f"weights and Adam's averages alone take {taken} bytes")
        return model(net, task.budget - taken, preprocess=Normalise(), device=task.device)


def _without_single(batch: int, num_images: int) -> int:
    """The next smaller batch with which an epoch's last one has more than one image."""
    while batch > 2 and num_images % batch == 1:
        batch -= 1
    return max(1, batch)


def _first_line(error: Exception) -> str:
    """What an error says, without the place in PyTorch's own code."""
    lines = re.sub(r"^\[.*?\] (err == 0. )?", "", str(error)).splitlines()
    return lines[0] if lines else type(error).__name__


class PiecesTrainer(Trainer):
    """Trains what reads images in pieces; of gradients that overflow where all pieces are blank, nothing."""

    def differentiate(
        self, sources: list[ImageSource], labels: Tensor, weight: float
    ) -> tuple[float, Tensor]:
        """Add the gradients of a batch; its loss and logits."""
        found = super().differentiate(sources, labels, weight)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        return found


class PatchGDTrainer(PiecesTrainer):
    """Trains by the inner steps of `PatchGD`."""

    def differentiate(
        self, sources: list[ImageSource], labels: Tensor, weight: float
    ) -> tuple[float, Tensor]:
        """Add the gradients of all inner steps; loss and logits are those of the last."""
        assert isinstance(self.model, PatchGD)
        self.model.begin(sources)
        num_steps = self.model.num_inner_steps
        for _ in range(num_steps):
            loss, logits = super().differentiate(sources, labels, weight / num_steps)
        return loss, logits
