"""Edit memories: state bank, targets, gates, operations on edits, their attachment, their files and their ledger."""

from .address import Gate as Gate
from .attachment import Attachment as Attachment
from .attachment import MemoryMismatchError as MemoryMismatchError
from .bank import BankConfig as BankConfig
from .calibration import Calibration as Calibration
from .combine import Difference as Difference
from .edit import Edit as Edit
from .ledger import Ledger as Ledger
from .ledger import LedgerError as LedgerError
from .manifest import EditFileError as EditFileError
from .memory import EditMemory as EditMemory
from .operations import REFUSAL as REFUSAL
from .operations import EditConflictError as EditConflictError
from .settings import Settings as Settings
