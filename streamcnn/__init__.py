"""Exact end-to-end training of CNNs on very large images under a hard memory ceiling."""

from streamcnn.data.sources import ImageSource as ImageSource
from streamcnn.data.sources import TensorSource as TensorSource
from streamcnn.data.sources import ZarrSource as ZarrSource
from streamcnn.errors import BudgetExceeded as BudgetExceeded
from streamcnn.errors import CorruptImage as CorruptImage
from streamcnn.errors import DatasetMismatch as DatasetMismatch
from streamcnn.errors import PlanDoesNotFit as PlanDoesNotFit
from streamcnn.errors import StreamError as StreamError
from streamcnn.errors import UnsupportedModel as UnsupportedModel
from streamcnn.plan.plan import Plan as Plan
from streamcnn.runtime.report import Report as Report
from streamcnn.runtime.streaming_model import StreamingModel as StreamingModel
from streamcnn.verification import Verification as Verification
from streamcnn.verification import verify as verify
