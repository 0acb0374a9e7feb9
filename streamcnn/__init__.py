"""Exact end-to-end training of CNNs on very large images under a hard memory ceiling.

Names that need PyTorch, and the package's modules, are imported when they are first used (PEP 562), so that
the command line answers ``--help`` and wrong usage at once.
"""

from typing import TYPE_CHECKING

from streamcnn.errors import (
    BudgetExceeded,
    CorruptImage,
    DatasetMismatch,
    PlanDoesNotFit,
    StreamError,
    UnsupportedModel,
)

__all__ = [
    "BudgetExceeded",
    "CorruptImage",
    "DatasetMismatch",
    "ImageSource",
    "Plan",
    "PlanDoesNotFit",
    "Report",
    "StreamError",
    "StreamingModel",
    "TensorSource",
    "UnsupportedModel",
    "Verification",
    "ZarrSource",
    "verify",
]

if TYPE_CHECKING:
    from streamcnn.data.sources import ImageSource, TensorSource, ZarrSource
    from streamcnn.plan.plan import Plan
    from streamcnn.runtime.report import Report
    from streamcnn.runtime.streaming_model import StreamingModel
    from streamcnn.verification import Verification, verify
else:
    _HOMES = {
        "ImageSource": "streamcnn.data.sources",
        "Plan": "streamcnn.plan.plan",
        "Report": "streamcnn.runtime.report",
        "StreamingModel": "streamcnn.runtime.streaming_model",
        "TensorSource": "streamcnn.data.sources",
        "Verification": "streamcnn.verification",
        "ZarrSource": "streamcnn.data.sources",
        "verify": "streamcnn.verification",
    }

    def __getattr__(name):
        import importlib
        import sys

        if name in _HOMES:
            value = getattr(importlib.import_module(_HOMES[name]), name)
            # Python does not ask again.
            globals()[name] = value
            return value
        part = f"{__name__}.{name}"
        try:
            return importlib.import_module(part)
        except ModuleNotFoundError as error:
            if error.name != part:
                raise
            message = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(message, name=name, obj=sys.modules[__name__]) from None

    def __dir__():
        return sorted({*globals(), *__all__})
