"""Benchmarks of the compiled operations against what PyTorch offers: ``python -m benchmarks.kernels NAME``.

Rivals do the same work and are checked against float64 before they are timed, in turns on one machine.
"""

from .run import BENCHMARKS, run

__all__ = ["BENCHMARKS", "run"]
