"""How edits are measured: benchmarks, likelihood and decoded text, paired comparison, proof that weights stayed."""

from .composite import composite as composite
from .measurement import Absent as Absent
from .measurement import Measurement as Measurement
from .measurement import Result as Result
from .measurement import Sheet as Sheet
from .measurement import UnlikeMeasurementsError as UnlikeMeasurementsError
from .measurement import average as average
from .paired import Paired as Paired
from .paired import paired as paired
from .paired import paired_all as paired_all
from .protocol import Comparison as Comparison
from .protocol import Evaluation as Evaluation
from .protocol import Protocol as Protocol
from .protocol import Score as Score
from .protocol import compare as compare
from .protocol import evaluate as evaluate
from .respondent import NO_EDIT as NO_EDIT
from .respondent import Condition as Condition
from .respondent import Respondent as Respondent
from .weights import WeightsWatch as WeightsWatch
