"""Tensor operations with compiled kernels, and the PyTorch reference each of them must agree with.

Every op works with nothing compiled. ``<op>_reference`` is the plain PyTorch definition; compiled code takes over per
device where it exists. Importing this package loads torch and nothing heavier, and does not touch the GPU.
"""

from timerome.ops.cholesky_rows import cholesky_append as cholesky_append
from timerome.ops.cholesky_rows import cholesky_append_reference as cholesky_append_reference
from timerome.ops.cholesky_rows import cholesky_delete as cholesky_delete
from timerome.ops.cholesky_rows import cholesky_delete_reference as cholesky_delete_reference
from timerome.ops.edit_sets import EditSets as EditSets
from timerome.ops.edit_sets import Segments as Segments
from timerome.ops.edit_sets import pack_edit_sets as pack_edit_sets
from timerome.ops.ridge_cholesky import NotPositiveDefiniteError as NotPositiveDefiniteError
from timerome.ops.ridge_cholesky import RidgeFactor as RidgeFactor
from timerome.ops.ridge_cholesky import ridge_cholesky as ridge_cholesky
from timerome.ops.ridge_cholesky import ridge_cholesky_reference as ridge_cholesky_reference
from timerome.ops.sparse_lowrank_residual import kept_count as kept_count
from timerome.ops.sparse_lowrank_residual import sparse_lowrank_residual as sparse_lowrank_residual
from timerome.ops.sparse_lowrank_residual import (
    sparse_lowrank_residual_reference as sparse_lowrank_residual_reference,
)
from timerome.ops.sparsify_add import sparsify_add as sparsify_add
from timerome.ops.sparsify_add import sparsify_add_ as sparsify_add_
from timerome.ops.sparsify_add import sparsify_add_reference as sparsify_add_reference

__all__ = [
    "EditSets",
    "NotPositiveDefiniteError",
    "RidgeFactor",
    "Segments",
    "cholesky_append",
    "cholesky_append_reference",
    "cholesky_delete",
    "cholesky_delete_reference",
    "kept_count",
    "pack_edit_sets",
    "ridge_cholesky",
    "ridge_cholesky_reference",
    "sparse_lowrank_residual",
    "sparse_lowrank_residual_reference",
    "sparsify_add",
    "sparsify_add_",
    "sparsify_add_reference",
]
