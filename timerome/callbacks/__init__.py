"""Lightning callbacks: edit or trace in an inference loop that exists already."""

from .edit import EditCallback as EditCallback
from .trace import TraceCallback as TraceCallback
