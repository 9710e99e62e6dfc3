"""Temporal causal tracing: where, and at which denoising step, a fact is carried."""

from .checkpoint import CheckpointError as CheckpointError
from .files import TraceFileError as TraceFileError
from .result import TraceError as TraceError
from .result import TraceResult as TraceResult
from .selection import Selection as Selection
from .shards import Shard as Shard
from .tracer import CausalTracer as CausalTracer
