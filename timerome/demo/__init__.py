"""The demo: trace, edit and evaluate TOFU forget01 on the bundled testbed, into a results folder."""

from .results import RETAIN as RETAIN
from .results import SETS as SETS
from .results import summary_rows as summary_rows
from .run import DEMO as DEMO
from .run import QUICK as QUICK
from .run import Demo as Demo
from .run import run_demo as run_demo
