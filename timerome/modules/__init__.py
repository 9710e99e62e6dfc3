"""LightningModules for inference with an edit memory."""

from .edit_module import EditModule as EditModule
from .edit_module import fact_loader as fact_loader
