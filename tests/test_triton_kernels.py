"""Triton's kernels where there is no card: what they give in its interpreter, and what they become."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import plain_passes
import pytest
import torch
from numpy.lib import NumpyVersion

from streamcnn.graph.ops import channel_kernels

triton = pytest.importorskip("triton", reason="Triton is for Linux")


@pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 makes numbers of arrays, which NumPy 2.4 refuses",
)
def test_kernels_give_what_plain_operators_do() -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    folder = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, folder / "triton_cases.py"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(folder.parent), "TRITON_INTERPRET": "1"},
    )
    assert run.returncode == 0, run.stderr
    cases = json.loads(run.stdout)
    assert len(cases) > 600
    wrong = {name: error for name, (error, allowed) in cases.items() if not error <= allowed}
    assert not wrong


KERNELS: dict[str, dict[str, Any]] = {
    "_normalise": {"KIND": "relu", "LOW": 0.0, "HIGH": 0.0, "ADDS": True},
    "_differentiate": {"KIND": "silu", "LOW": 0.0, "HIGH": 0.0},
    "_observe": {},
    "_merge": {"PROGRAMS": 256, "CHANNELS": 8},
}


def compiled(
    name: str, channels: int, capability: int, float_type: str, half_type: str, **constants: Any
) -> Any:
    """A kernel compiled down to a card's machine code, for which no card is needed."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from streamcnn.graph.ops import triton_passes

    kernel = getattr(triton_passes, name)
    grid = triton_passes._Grid.of(torch.empty(1, channels, 8, 8))
    type_ = {"fp32": tl.float32, "fp64": tl.float64}[float_type]
    constants = {**grid.constants, **KERNELS[name], **constants, "TYPE": type_}
    halves = {"x", "gradient", "summand", "result"}
    types: dict[str, str] = {}
    for argument in kernel.arg_names:
        if argument in constants:
            types[argument] = "constexpr"
        elif argument in ("rows", "groups", "channels", "programs"):
            types[argument] = "i32"
        else:
            types[argument] = f"*{half_type}" if argument in halves else f"*{float_type}"
    places = {argument: (place,) for place, argument in enumerate(kernel.arg_names)}
    found = triton.compile(
        ASTSource(
            kernel,
            types,
            {places[argument]: value for argument, value in constants.items() if argument in places},
            {places[a]: [["tt.divisibility", 16]] for a, kind in types.items() if kind.startswith("*")},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"enable_fp_fusion": True},
    )
    assert found.asm["cubin"]
    return found


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("channels", [64, 24])
@pytest.mark.parametrize("name", KERNELS)
def test_threads_read_and_write_16_bytes_at_once(name: str, channels: int, capability: int) -> None:
    code = compiled(name, channels, capability, "fp32", "bf16").asm["ptx"]
    if name != "_merge":
        assert "ld.global.v4.b32" in code
        # A program takes the value that moments are differences to once.
        assert code.count("ld.global.b16") <= (name == "_observe")
    if name in ("_normalise", "_differentiate"):
        assert "st.global.v4.b32" in code
        assert "st.global.b16" not in code


def test_moments_are_merged_with_few_divisions() -> None:
    """One in float64 is dozens of instructions, and one block merges what all programs have found."""
    code = compiled("_merge", 64, 90, "fp32", "bf16").asm["ptx"]
    assert code.count("div.rn.f64") <= 8


@pytest.mark.parametrize("name", ["_normalise", "_differentiate"])
@pytest.mark.parametrize("kind", ["hardtanh", "leaky_relu", "silu", "hardswish"])
def test_numbers_are_as_precise_as_maps(name: str, kind: str) -> None:
    """Triton's interpreter does not round those that it compiles as float32."""
    code = compiled(name, 64, 90, "fp64", "fp64", KIND=kind, LOW=0.1, HIGH=0.7).asm["ptx"]
    rounded = {struct.pack(">d", np.float32(number)).hex().upper() for number in (0.1, 0.7)}
    assert not {f"0d{digits}" for digits in rounded} & set(re.findall("0d[0-9A-F]{16}", code))


class TestChoice:
    """Which passes a card's maps are given to."""

    device = torch.device("cpu")

    @pytest.fixture(autouse=True)
    def forgotten(self) -> Iterator[None]:
        channel_kernels._passes.cache_clear()
        yield
        channel_kernels._passes.cache_clear()

    @pytest.fixture
    def own(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        """The passes in plain operators, in the place of those for a card."""
        names = ("moments", "normalised", "gradients", "plus_line")
        passes = SimpleNamespace(**{name: getattr(plain_passes, name) for name in names})
        monkeypatch.setitem(sys.modules, "streamcnn.graph.ops.triton_passes", passes)  # type: ignore[arg-type]
        monkeypatch.setattr("streamcnn.graph.ops.triton_passes", passes, raising=False)
        return passes

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_what_works_is_taken(self, own: SimpleNamespace, dtype: torch.dtype) -> None:
        state = torch.get_rng_state()
        assert channel_kernels._passes(self.device, dtype) is own
        assert torch.equal(state, torch.get_rng_state())

    @pytest.mark.parametrize("name", ["moments", "normalised", "gradients", "plus_line"])
    def test_what_gives_other_values_is_not(
        self, own: SimpleNamespace, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right = getattr(own, name)

        def wrong(*args: Any) -> Any:
            found = right(*args)
            return tuple(each * 1.001 for each in found) if isinstance(found, tuple) else found * 1.001

        monkeypatch.setattr(own, name, wrong)
        with pytest.warns(UserWarning, match="differ from plain operators.*STREAMCNN_TRITON=0"):
            assert channel_kernels._passes(self.device, torch.float32) is None

    def test_what_cannot_be_compiled_is_not(
        self, own: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any) -> Any:
            raise RuntimeError("Failed to find C compiler\nand more")

        monkeypatch.setattr(own, "moments", fail)
        with pytest.warns(UserWarning, match="do not work for torch.float32 on cpu: Failed to find C comp"):
            assert channel_kernels._passes(self.device, torch.float32) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert channel_kernels._passes(self.device, torch.float32) is None

    @pytest.mark.parametrize(
        "refusal",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            RuntimeError("Triton Error [CUDA]: out of memory"),
        ],
        ids=repr,
    )
    def test_refused_memory_is_no_answer(
        self, own: SimpleNamespace, refusal: RuntimeError, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: Any) -> Any:
            raise refusal

        with monkeypatch.context() as patch:
            patch.setattr(own, "moments", refuse)
            with pytest.raises(type(refusal), match=re.escape(str(refusal))):
                channel_kernels._passes(self.device, torch.float32)
        assert channel_kernels._passes(self.device, torch.float32) is own

    def test_nothing_is_interpreted_for_a_card(self, own: SimpleNamespace) -> None:
        own.IS_INTERPRETED = True
        assert channel_kernels._passes(torch.device("cuda", 0), torch.float32) is None

    def test_without_triton_or_where_it_is_not_wanted(
        self, own: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(channel_kernels.VARIABLE, "0")
        assert channel_kernels._passes(self.device, torch.float32) is None
        monkeypatch.delenv(channel_kernels.VARIABLE)
        channel_kernels._passes.cache_clear()
        monkeypatch.setitem(sys.modules, "streamcnn.graph.ops.triton_passes", None)
        monkeypatch.delattr("streamcnn.graph.ops.triton_passes")
        assert channel_kernels._passes(self.device, torch.float32) is None
