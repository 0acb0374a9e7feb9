"""Run a module or a script on the emulated card: ``python -m emulated_card -m benchmarks speed …``."""

from __future__ import annotations

import runpy
import sys

import emulated_card

emulated_card.install()
sys.argv = sys.argv[1:]
if sys.argv[0] == "-m":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
