"""Calibration tokens and perplexity."""

from .calibration import calibration_ids, encode, sample_windows
from .perplexity import perplexity
from .sentences import sentence_batches, split_sentences
from .sources import read_documents

__all__ = ["calibration_ids", "encode", "perplexity", "read_documents", "sample_windows", "sentence_batches", "split_sentences"]
