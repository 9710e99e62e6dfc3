"""``cholesky_rows`` against its rivals; CSV, plot and what it was measured on go to benchmarks/results.

python -m benchmarks.bench_cholesky_rows [--device cuda] [--grid quick|normal|full] [--threads N]
"""

from benchmarks.kernels import main

if __name__ == "__main__":
    main("cholesky_rows")
