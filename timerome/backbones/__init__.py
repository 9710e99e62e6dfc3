"""Backbones: records of where things are in each architecture, and one interface over them."""

from .architectures import Architecture as Architecture
from .architectures import Gates as Gates
from .architectures import Inputs as Inputs
from .backbone import Backbone as Backbone
from .loading import load as load
from .probes import CausalModelError as CausalModelError
from .registry import UnknownArchitectureError as UnknownArchitectureError
from .registry import architectures as architectures
from .registry import recognise as recognise
from .registry import register as register
from .registry import wrap as wrap
