"""Why a module could not be captured."""


class CaptureError(RuntimeError):
    """The module's forward cannot be expressed as one graph."""


class DataDependentError(CaptureError):
    """The forward branches on, or iterates over, values computed from tensor data."""


class UnrecordedValueError(CaptureError):
    """A tensor appeared that no recorded operation produced.

    Args:
        message: what was found.
        scope: path of the innermost module in whose forward it appeared, relative to the traced root.
    """

    def __init__(self, message: str, scope: str) -> None:
        super().__init__(message)
        self.scope = scope


class SizeMismatchError(CaptureError):
    """A graph is run on an input for which the code that was traced would have branched otherwise."""
