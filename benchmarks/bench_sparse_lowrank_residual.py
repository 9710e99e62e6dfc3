"""``sparse_lowrank_residual`` against its rivals; CSV, plot and what it was measured on go to benchmarks/results.

python -m benchmarks.bench_sparse_lowrank_residual [--device cuda] [--grid quick|normal|full] [--threads N]
"""

from benchmarks.kernels import main

if __name__ == "__main__":
    main("sparse_lowrank_residual")
