"""How edits are measured: likelihood and decoded text of facts, paired comparison, proof that weights stayed."""

from .protocol import Comparison as Comparison
from .protocol import Evaluation as Evaluation
from .protocol import Protocol as Protocol
from .protocol import Score as Score
from .protocol import compare as compare
from .protocol import evaluate as evaluate
from .weights import WeightsWatch as WeightsWatch
