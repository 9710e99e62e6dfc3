"""Edit memories: edits and their gates, methods, states, attachments, files and ledger."""

from ..errors import EditConflictError as EditConflictError
from ..errors import EditFileError as EditFileError
from ..errors import MemoryMismatchError as MemoryMismatchError
from .edits import REFUSAL as REFUSAL
from .edits import AnswerGate as AnswerGate
from .edits import Edit as Edit
from .edits import Keyed as Keyed
from .edits import Placed as Placed
from .edits import Watch as Watch
from .ledger import Ledger as Ledger
from .ledger import LedgerError as LedgerError
from .memory import Difference as Difference
from .memory import EditMemory as EditMemory
from .memory import paper_memory as paper_memory
from .methods import ByPlace as ByPlace
from .methods import Ridge as Ridge
from .runtime.attachment import Attachment as Attachment
from .runtime.attachment import unedited as unedited
from .state import MemoryState as MemoryState
from .states import BankConfig as BankConfig
