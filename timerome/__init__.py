"""timerome: inference-time knowledge editing for masked diffusion language models.

Locate where a fact is carried (:class:`CausalTracer`), add a closed-form edit memory there (:class:`EditMemory`) while
the weights stay as they are, and drop it into an inference loop you have (:class:`EditCallback`).
"""

import importlib
from typing import TYPE_CHECKING, Any

import torch as _torch  # noqa: F401  first, so that its OpenMP pool is the one the extension shares

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from . import datasets as datasets
    from . import ops as ops
    from ._backend import backend_info as backend_info
    from .backbones import Backbone as Backbone
    from .backbones import load as load
    from .backbones import register as register
    from .backbones import wrap as wrap
    from .coordinates import Coordinate as Coordinate
    from .coordinates import Site as Site
    from .diffusion import SamplerConfig as SamplerConfig
    from .diffusion import generate as generate
    from .diffusion import log_likelihood as log_likelihood
    from .facts import Fact as Fact
    from .facts import FactSet as FactSet
    from .lightning import EditCallback as EditCallback
    from .lightning import EditModule as EditModule
    from .lightning import TraceCallback as TraceCallback
    from .memory import REFUSAL as REFUSAL
    from .memory import BankConfig as BankConfig
    from .memory import ByPlace as ByPlace
    from .memory import EditMemory as EditMemory
    from .memory import Ridge as Ridge
    from .memory import paper_memory as paper_memory
    from .tracing import CausalTracer as CausalTracer
    from .tracing import TraceConfig as TraceConfig
    from .tracing import TraceResult as TraceResult

# Everything is loaded on first use: importing timerome costs little more than importing torch, and neither
# transformers nor lightning is imported before something needs it.
_HOMES = {
    "Backbone": "backbones",
    "BankConfig": "memory",
    "ByPlace": "memory",
    "CausalTracer": "tracing",
    "Coordinate": "coordinates",
    "EditCallback": "lightning",
    "EditMemory": "memory",
    "EditModule": "lightning",
    "Fact": "facts",
    "FactSet": "facts",
    "REFUSAL": "memory",
    "Ridge": "memory",
    "SamplerConfig": "diffusion",
    "Site": "coordinates",
    "TraceCallback": "lightning",
    "TraceConfig": "tracing",
    "TraceResult": "tracing",
    "backend_info": "_backend",
    "generate": "diffusion",
    "load": "backbones",
    "log_likelihood": "diffusion",
    "paper_memory": "memory",
    "register": "backbones",
    "wrap": "backbones",
}

__all__ = ["__version__", "datasets", "ops", *sorted(_HOMES)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in ("datasets", "ops"):
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'timerome' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
