"""Backbones: records of where things are in each architecture, and one interface over them."""

from .architectures import Architecture as Architecture
from .backbone import Backbone as Backbone
from .registry import UnknownArchitectureError as UnknownArchitectureError
from .registry import architectures as architectures
from .registry import load as load
from .registry import recognise as recognise
from .registry import register as register
from .registry import wrap as wrap
