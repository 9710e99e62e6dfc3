"""How edits are measured: benchmarks, likelihood and decoded text, paired comparison, proof that weights stayed."""

from .comparison import Paired as Paired
from .comparison import composite as composite
from .comparison import paired as paired
from .comparison import paired_all as paired_all
from .measurement import Absent as Absent
from .measurement import Measurement as Measurement
from .measurement import Result as Result
from .measurement import Sheet as Sheet
from .measurement import UnlikeMeasurementsError as UnlikeMeasurementsError
from .report import Report as Report
from .respondent import NO_EDIT as NO_EDIT
from .respondent import Condition as Condition
from .respondent import Respondent as Respondent
from .suites.facts import Comparison as Comparison
from .suites.facts import Evaluation as Evaluation
from .suites.facts import Protocol as Protocol
from .suites.facts import Score as Score
from .suites.facts import compare as compare
from .suites.facts import evaluate as evaluate
from .weights import WeightsWatch as WeightsWatch
