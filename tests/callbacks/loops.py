"""Where tests/lightning/loops.py was; for tests/memory until it imports from there."""

from tests.lightning.loops import count_hooks as count_hooks
from tests.lightning.loops import gated_memory as gated_memory
from tests.lightning.loops import masked_rows as masked_rows
from tests.lightning.loops import shared_memory as shared_memory
