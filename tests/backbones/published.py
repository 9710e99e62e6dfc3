"""The published modelling files, unmodified, tiny and random, where they are at hand."""

from __future__ import annotations

from tests.backbones.models import Model

PUBLISHED: dict[str, Model] = {}
