"""Lightning: callbacks that edit or trace in a loop that exists already, and a module for those who have none.

The only folder that imports ``lightning``.
"""

from .edit_callback import EditCallback as EditCallback
from .edit_module import EditModule as EditModule
from .edit_module import fact_loader as fact_loader
from .trace_callback import TraceCallback as TraceCallback
