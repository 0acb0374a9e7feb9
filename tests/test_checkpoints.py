"""Checkpoints: which stay, and what is done about damaged ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import damage, make_trainer

from streamcnn.errors import (
    DamagedCheckpoint,
)
from streamcnn.training.checkpoint_file import load_checkpoint
from streamcnn.training.checkpoints import CheckpointFolder


def test_an_intact_checkpoint_is_not_removed_for_a_damaged_one(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    for update in (1, 2):
        checkpoints.save({"update": update}, update)
    damage(checkpoints.paths()[0])
    with pytest.warns(UserWarning, match="is damaged"):
        assert checkpoints.newest() == {"update": 1}
    checkpoints.save({"update": 2}, 2)
    assert [load_checkpoint(path)["update"] for path in checkpoints.paths()] == [2, 1]


def test_the_best_is_the_one_that_was_best_at_the_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, epochs=2, save_every=1)
    trainer.run()
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    known = load_checkpoint(checkpoints.paths()[0])["progress"]["best"]
    # A later epoch was better, but its checkpoint is damaged.
    later = checkpoints.save({"update": 9}, 9)
    checkpoints.mark_best(later.name)
    damage(later)
    with pytest.warns(UserWarning, match="is damaged"):
        result = make_trainer(tmp_path, epochs=2, save_every=1).run()
    assert result.best.name == known
    assert checkpoints.best() == result.best


def test_a_best_checkpoint_that_is_gone_is_noticed(tmp_path: Path) -> None:
    result = make_trainer(tmp_path, epochs=5, learning_rate=1e-9, ema_decay=None).run()
    assert result.best not in CheckpointFolder(tmp_path / "checkpoints").paths()[:2]
    result.best.unlink()
    with (
        pytest.warns(UserWarning, match=f"{result.best.name}, the best checkpoint, is gone"),
        pytest.raises(DamagedCheckpoint, match="is gone: train for more epochs"),
    ):
        make_trainer(tmp_path, epochs=5, learning_rate=1e-9, ema_decay=None).run()


def test_damage_to_all_checkpoints_is_an_error(tmp_path: Path) -> None:
    make_trainer(tmp_path, epochs=1).run()
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    for path in checkpoints.paths():
        damage(path)
    with pytest.raises(DamagedCheckpoint, match=r"no checkpoint in .* can be used.*is damaged.*is damaged"):
        make_trainer(tmp_path).run()
    digest = checkpoints.paths()[0].with_name(checkpoints.paths()[0].name + ".sha256")
    digest.unlink()
    with pytest.raises(DamagedCheckpoint, match="has no digest beside it"):
        load_checkpoint(checkpoints.paths()[0])


def test_the_best_checkpoint_stays_and_older_ones_go(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    assert checkpoints.best() is None
    for update in range(1, 6):
        path = checkpoints.save({"update": update}, update)
        if update == 2:
            checkpoints.mark_best(path.name)
    assert [load_checkpoint(path)["update"] for path in checkpoints.paths()] == [5, 4, 2]
    checkpoints.mark_best(checkpoints.paths()[1].name)
    checkpoints.save({"update": 6}, 6)
    checkpoints.save({"update": 7}, 7)
    assert [load_checkpoint(path)["update"] for path in checkpoints.paths()] == [7, 6, 4]
    assert checkpoints.best() == checkpoints.paths()[-1]
    # Nothing but these, their digests and the marker.
    assert len(list(tmp_path.iterdir())) == 7
