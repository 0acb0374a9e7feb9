"""The dataset, its division, its samplers and batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from streamcnn import DatasetMismatch, StreamingModel
from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.dataset import TileDataset, collate, prefetched
from streamcnn.data.sampling import ResumableSampler, balanced_subset, divide
from streamcnn.data.sources import TensorSource
from streamcnn.data.tile_store import Head, TileStoreWriter, write_image_folder
from streamcnn.geometry.regions import Region

SIZE = (23, 31)


def image(index: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (1, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(index)
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training images with labels 0, 1, 2 and one that nobody has labelled."""
    folder = tmp_path_factory.mktemp("store")
    with TileStoreWriter(folder, Head("images", {})) as writer:
        for index in range(7):
            split, label = ("train", index % 3) if index < 6 else ("rest", None)
            writer.add(
                write_image_folder(
                    folder,
                    TensorSource(image(index)),
                    name=f"{split}/{index}",
                    split=split,
                    label=label,
                    levels=1,
                    origin={},
                )
            )
        writer.finish()
    return folder


def test_samples_are_lazy_sources_and_labels(store: Path) -> None:
    images = TileDataset(store, "train")
    assert len(images) == 6
    assert images.labels == (0, 1, 2, 0, 1, 2)
    source, label = images[4]
    assert label == 1
    assert source.bytes_read == 0
    assert torch.equal(source.read(Region.whole(SIZE)), image(4))


def test_positions_take_a_part(store: Path) -> None:
    images = TileDataset(store, "train", positions=(5, 0))
    assert images.labels == (2, 0)
    assert torch.equal(images[0][0].read(Region.whole(SIZE)), image(5))


def test_what_is_not_there_is_named(store: Path) -> None:
    with pytest.raises(DatasetMismatch, match=r"no images of split 'test': it has \['rest', 'train'\]"):
        TileDataset(store, "test")
    with pytest.raises(DatasetMismatch, match=r"rest/6 in .* has no label"):
        TileDataset(store)


def test_augmentations_change_with_the_epoch_alone(store: Path) -> None:
    images = TileDataset(store, "train", augmentation=RandomAugmentation(turns=True, inversion=0.5), seed=3)

    def first_pixels() -> list[torch.Tensor]:
        found = (images[position][0] for position in range(len(images)))
        return [source.read(Region.whole(source.shape[1:])) for source in found]

    first, again = first_pixels(), first_pixels()
    assert all(map(torch.equal, first, again))
    images.set_epoch(1)
    assert not all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, first_pixels(), strict=True)
    )


@pytest.mark.parametrize("start", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_hand_over_sources(store: Path, start: str) -> None:
    images = TileDataset(store, "train")
    images[0][0].read(Region.whole(SIZE))  # zarr's threads run before the fork
    loader = DataLoader(
        images, batch_size=2, num_workers=1, collate_fn=collate, multiprocessing_context=start
    )
    seen = []
    for sources, labels in loader:
        seen += labels.tolist()
        for source in sources:
            assert source.read(Region.whole(SIZE)).shape == (1, *SIZE)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_a_model_trains_on_batches(store: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model = StreamingModel(net, tile=16, preprocess=lambda tile: tile / 255)
    images = TileDataset(store, "train")
    for sources, labels in DataLoader(
        images, batch_size=3, sampler=ResumableSampler(images), collate_fn=collate
    ):
        nn.functional.cross_entropy(model(sources), labels).backward()
    weight = net[0].weight
    assert isinstance(weight, nn.Parameter)
    assert weight.grad is not None


def test_prefetching_asks_for_the_next_image_of_the_epoch(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = TileDataset(store, "train", positions=(0, 1, 2))
    asked: list[int] = []
    monkeypatch.setattr(TileDataset, "prefetch", lambda self, position: asked.append(position))
    sampler = ResumableSampler(images, shuffle=False)
    seen = [(label, list(asked)) for _, label in prefetched(images, sampler)]
    assert seen == [(0, [1]), (1, [1, 2]), (2, [1, 2])]
    monkeypatch.undo()
    assert [label for _, label in prefetched(images, sampler)] == [0, 1, 2]


def test_a_run_that_prefetches_is_resumed_exactly(store: Path) -> None:
    images = TileDataset(store, "train")
    whole = [source.name for epoch in range(2) for source, _ in prefetched(images, _at(images, epoch))]
    sampler = ResumableSampler(images, seed=5)
    used = []
    for source, _ in prefetched(images, sampler):
        used.append(source.name)
        if len(used) == 4:
            break
    resumed = ResumableSampler(images, seed=5)
    resumed.load_state_dict(sampler.state_dict())
    for _ in range(2):
        used += [source.name for source, _ in prefetched(images, resumed)]
    assert used == whole


def _at(images: TileDataset, epoch: int) -> ResumableSampler:
    sampler = ResumableSampler(images, seed=5)
    sampler.load_state_dict({**sampler.state_dict(), "epoch": epoch})
    return sampler


# --- divisions ------------------------------------------------------------------------------------------

labels_of_images = st.lists(st.integers(0, 5), max_size=60)


@given(labels=labels_of_images, share=st.floats(0, 0.9), seed=st.integers(0, 3))
def test_a_division_is_stratified(labels: list[int], share: float, seed: int) -> None:
    training, validation = divide(labels, share=share, seed=seed)
    assert sorted((*training, *validation)) == list(range(len(labels)))
    assert (training, validation) == divide(labels, share=share, seed=seed)
    counts, held_out = Counter(labels), Counter(labels[p] for p in validation)
    assert all(abs(held_out[label] - share * counts[label]) <= 1 for label in counts)
    assert abs(len(validation) - share * len(labels)) <= 1


def test_a_division_depends_on_the_seed() -> None:
    labels = [i % 28 for i in range(280)]
    divisions = {divide(labels, seed=seed)[1] for seed in range(5)}
    assert len(divisions) == 5
    assert all(Counter(labels[p] for p in held_out) == Counter(range(28)) for held_out in divisions)
    with pytest.raises(ValueError, match="share=1: allowed are 0 and more"):
        divide(labels, share=1)


@pytest.mark.parametrize("num_images", range(2, 6))
def test_a_share_of_few_images_is_one_image(num_images: int) -> None:
    labels = ["rare", *["common"] * num_images]
    divisions = {divide(labels, share=0.01, seed=seed) for seed in range(40)}
    # Any of the commonest label, by the seed, and never the only one of its label.
    assert {held_out for _, held_out in divisions} == {(p,) for p in range(1, num_images + 1)}
    for training, held_out in divisions:
        assert sorted((*training, *held_out)) == list(range(num_images + 1))


@pytest.mark.parametrize(("labels", "share"), [([0, 0, 0], 0), ([0, 1, 2, 3], 0.1), ([], 0.1)])
def test_no_image_is_set_aside_unasked_or_where_each_is_its_label_s_only_one(
    labels: list[int], share: float
) -> None:
    assert divide(labels, share=share) == (tuple(range(len(labels))), ())


def test_a_subset_has_as_many_of_each() -> None:
    labels = "aaaabbbbbbcc"
    chosen = balanced_subset(labels, 2, seed=1)
    assert Counter(labels[p] for p in chosen) == {"a": 2, "b": 2, "c": 2}
    with pytest.raises(ValueError, match="label 'c' has 2 images, 3 of each are asked for"):
        balanced_subset(labels, 3)


# --- the sampler ----------------------------------------------------------------------------------------


def test_an_epoch_has_every_image_once() -> None:
    sampler = ResumableSampler(range(50), seed=1)
    epochs = [list(sampler) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(ResumableSampler(range(5), shuffle=False)) == [0, 1, 2, 3, 4]


@given(taken=st.integers(0, 25), length=st.integers(1, 10))
def test_a_resumed_sampler_goes_on(taken: int, length: int) -> None:
    def endless(sampler: ResumableSampler) -> list[int]:
        found: list[int] = []
        while len(found) < 30:
            found += sampler
        return found[:30]

    whole = endless(ResumableSampler(range(length), seed=2))
    first = ResumableSampler(range(length), seed=2)
    handed_out: list[int] = []
    while len(handed_out) < taken:
        for position in first:
            handed_out.append(position)
            if len(handed_out) == taken:
                break
    second = ResumableSampler(range(length), seed=2)
    second.load_state_dict(first.state_dict())
    assert (handed_out + endless(second))[:30] == whole


def test_another_run_is_not_resumed() -> None:
    state = ResumableSampler(range(5), seed=1).state_dict()
    with pytest.raises(ValueError, match="the saved sampler has seed 1, this one 2"):
        ResumableSampler(range(5), seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="the saved sampler has length 5, this one 6"):
        ResumableSampler(range(6), seed=1).load_state_dict(state)


def test_epochs_may_be_balanced() -> None:
    labels = [0] * 10 + [1] * 3
    sampler = ResumableSampler(labels, labels=labels)
    assert len(sampler) == 6
    epochs = [list(sampler) for _ in range(4)]
    assert all(Counter(labels[p] for p in epoch) == {0: 3, 1: 3} for epoch in epochs)
    assert len({tuple(sorted(epoch)) for epoch in epochs}) > 1
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        ResumableSampler(range(2), labels=[0])
