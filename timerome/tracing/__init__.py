"""Temporal causal tracing: where, and at which denoising step, a fact is carried."""

from .checkpoint import CheckpointError as CheckpointError
from .config import TraceConfig as TraceConfig
from .data import TraceError as TraceError
from .files import TraceFileError as TraceFileError
from .result import TraceResult as TraceResult
from .shards import Shard as Shard
from .tracer import CausalTracer as CausalTracer
