"""``python -m timerome.cli``."""

import sys

from . import main

sys.exit(main())
