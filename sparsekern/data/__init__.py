"""Calibration tokens and perplexity."""

from .calibration import (
    CalibrationText,
    as_calibration,
    calibration_ids,
    describe_calibration,
    encode,
    evaluation_ids,
    is_source,
    sample_windows,
)
from .perplexity import perplexity
from .sentences import sentence_batches, split_sentences
from .sources import read_documents

__all__ = [
    "CalibrationText",
    "as_calibration",
    "calibration_ids",
    "describe_calibration",
    "encode",
    "evaluation_ids",
    "is_source",
    "perplexity",
    "read_documents",
    "sample_windows",
    "sentence_batches",
    "split_sentences",
]
