"""Edit memories: state bank, targets, gates, the memory itself, its attachment and its file."""

from .address import Gate as Gate
from .attachment import Attachment as Attachment
from .attachment import MemoryMismatchError as MemoryMismatchError
from .bank import BankConfig as BankConfig
from .files import EditFileError as EditFileError
from .memory import EditMemory as EditMemory
from .memory import Settings as Settings
