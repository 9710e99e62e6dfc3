"""Temporal causal tracing: where, and at which denoising step, a fact is carried."""

from .checkpoint import CheckpointError as CheckpointError
from .result import TraceError as TraceError
from .result import TraceFileError as TraceFileError
from .result import TraceResult as TraceResult
from .tracer import CausalTracer as CausalTracer
