"""The UltraMNIST harness: what the files of methods say, and what it is asked for."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.harness.catalogue import KINDS, load_methods
from benchmarks.harness.classifiers import (
    WholeImages,
    make_net,
)
from benchmarks.harness.kinds.stream import Stream
from benchmarks.harness.method import TrainedMethod
from streamcnn import StreamingModel

PUBLISHED = """
RN-256 8.9 8.9
RN-512 24.5 24.5
RN-1024 31.3 31.3
ENB0-256 20.4 18.6
ENB0-512 49.8 43.9
ENB0-1024 49.0 49.0
ENB3-256 30.3 26.7
ENB3-512 72.3 69.1
ENB3-1024 79.1 54.5
"""


def test_the_papers_rows_are_there_with_their_figures_and_hyperparameters() -> None:
    methods = load_methods()
    for line in PUBLISHED.strip().splitlines():
        name, unrestricted, at_11 = line.split()
        assert methods[name].published["unrestricted"] == unrestricted
        assert methods[name].published["11 GB"] == at_11
        assert {known.budget for known in methods[name].hyperparameters} == {"11GB", "24GB"}
    best = methods["ENB3-512"].hyperparameters_for(24 * 10**9)
    assert (best.learning_rate, best.gamma, best.batch) == (8e-4, 0.98, 32)
    # Below the smallest budget of the paper there is nothing else to go by.
    assert methods["RN-1024"].hyperparameters_for(10**9).batch == 3
    assert methods["RN-1024"].hyperparameters_for(12 * 10**9).batch == 3
    assert {method.kind for method in methods.values()} == set(KINDS)
    assert methods["random guess"].published["unrestricted"] == f"{100 / 28:.1f}"


def test_shrinking_rows_of_one_backbone_differ_in_the_resolution_alone() -> None:
    families: dict[str, set[str | None]] = {}
    for method in load_methods().values():
        families.setdefault(method.family, set()).add(method.model)
    assert all(len(models) == 1 for models in families.values())


def test_a_method_file_with_a_mistake_is_named(tmp_path: Path) -> None:
    path = tmp_path / "10-wrong.toml"
    for text, message in (
        ('name = "a"\nkind = "shrunk"\nfamily = "b"', "no kind shrunk: there are shrink, resizer, stream, "),
        ('name = "a"\nkind = "shrink"\nfamily = "b"\nsize = 3', "size"),
        ('name = "a"\nfamily = "b"', "kind"),
        ('name = "a"\nkind = "shrink"\nfamily = "b"', "has no resolution and no model and no hyperp"),
        ('name = "a"\nkind = "tiles"\nfamily = "b"\nmodel = "c"', "has no tile and no hyperparameters"),
    ):
        path.write_text(f"[[method]]\n{text}\n")
        with pytest.raises(ValueError, match=f"10-wrong.toml: .*{message}"):
            load_methods(tmp_path)


def test_every_method_that_runs_can_be_made() -> None:
    """At the smallest scale, without the largest networks."""
    for method in load_methods().values():
        large = ("EfficientNet-B7", "EfficientNet-B3", "ResNet-50")
        if isinstance(method, TrainedMethod) and method.family not in large:
            assert method.model is not None
            assert method.hyperparameters
            net = make_net(method.model, 10, 64, pretrained=False)
            model = StreamingModel(net) if isinstance(method, Stream) else WholeImages(net)
            assert sum(p.numel() for p in model.parameters()) > 10**4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--scale": "huge"}, "no scale huge: there are paper, single"),
        ({"--methods": "RN-256, RN-300"}, "no method RN-300: there are RN-256, "),
        ({"--seeds": "1,b"}, "cannot read seeds '1,b': allowed are whole numbers"),
        ({"--budget": "much"}, "--budget: "),
        ({"--device": "gpu"}, "no device gpu: there is cpu"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_made(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    given = {"--scale": "tiny", "--budget": "150MB", "--work": str(tmp_path / "work"), **changes}
    found = CliRunner().invoke(app, ["run", *itertools.chain(*given.items())])
    assert found.exit_code == 2
    text = " ".join(found.output.replace("│", " ").split())
    assert message in text
    assert not (tmp_path / "work").exists()


def test_a_method_that_is_not_built_yet_says_so(tmp_path: Path) -> None:
    arguments = ("--scale=tiny", "--budget=150MB", f"--work={tmp_path}", "--digits=uci", "--workers=0")
    found = CliRunner().invoke(app, ["run", *arguments, "--methods=PARTITION-RN50"])
    assert found.exit_code == 0
    assert "PARTITION-RN50 is not run: tiles divided among processes: not built yet" in found.output


def test_the_list_of_methods_has_all_of_them() -> None:
    found = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "200"})
    assert found.exit_code == 0
    assert all(name in found.output for name in load_methods())
