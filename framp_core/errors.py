"""Named errors of FRAMP, all under one base class.

Each message says what was given, what was expected, and what to do next.
"""


class FrampError(Exception):
    """Base class of every error that FRAMP raises on purpose."""


class ConfigError(FrampError):
    """A configuration key or value is unknown, out of range, or contradicts another one."""


class DataError(FrampError):
    """A data set or a partition cannot be read or does not hold what was asked for."""


class ModelError(FrampError):
    """An architecture or a generator cannot be built as asked."""


class RunFolderError(FrampError):
    """A run folder exists already, is incomplete, or cannot be written."""


class WriteError(RunFolderError):
    """A file cannot be written, as on a full disk; what was written before it is whole."""


class ResumeError(FrampError):
    """A run cannot go on from its checkpoint: it is finished, or is of other code, settings or data."""


class EngineError(FrampError):
    """An engine could not start, or a run failed in it."""


class OutputError(FrampError):
    """What the command prints cannot be written."""


class ProtocolError(FrampError):
    """A message between server and client breaks the protocol."""


class VersionMismatchError(ProtocolError):
    """The message was written by another protocol version."""


class TruncatedMessageError(ProtocolError):
    """The message is shorter or longer than its header says."""


class ChecksumError(ProtocolError):
    """The bytes of the message changed on the way."""


class MaskMismatchError(ProtocolError):
    """A mask has indices out of range or another number of kept weights than expected."""


class UnknownReferenceError(ProtocolError):
    """A mask is coded against a reference that the receiver does not hold."""


class NonFiniteError(ProtocolError):
    """A tensor in the message holds NaN or infinity."""


class FingerprintMismatchError(ProtocolError):
    """Client and server run different code."""
