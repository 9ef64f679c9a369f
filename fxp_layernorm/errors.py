"""Every error that this package raises on purpose.

::

    FxpError
    ├── InputError (also ValueError)        a value, shape or file content that can't be used
    │   ├── CodeTypeError (also TypeError)  an array of another dtype than the spec's
    │   ├── SpecFileError                   a spec or parameter file that is broken or of another version
    │   ├── ModelError                      an ONNX model that can't be read, or has nothing to replace
    │   └── DataError                       feeds that don't fit the model
    ├── PlanError (also ValueError)         a layer that doesn't fit the widths that were asked for
    ├── EngineError (also RuntimeError)     a cluster that can't be reached, or that lost its workers
    ├── WidthError (also ArithmeticError)   an intermediate value left its proved width: a bug of ours
    └── MissingDependencyError (also ImportError)

Messages say what is wrong, the value, and what to do.
"""

from __future__ import annotations


class FxpError(Exception):
    """Base of all errors of this package."""


class InputError(FxpError, ValueError):
    """A value, shape or content that can't be used."""


class CodeTypeError(InputError, TypeError):
    """An array whose dtype is not the one that the spec names."""


class SpecFileError(InputError):
    """A spec or parameter file that is truncated, damaged or of another schema version."""


class ModelError(InputError):
    """An ONNX model that can't be read, or that holds nothing to work on."""


class DataError(InputError):
    """Feeds that are missing, empty or don't fit the model's inputs."""


class PlanError(FxpError, ValueError):
    """A layer that doesn't fit the asked widths; the message holds the figure that broke them."""


class EngineError(FxpError, RuntimeError):
    """A cluster that can't be reached, has no workers, or lost too many of them."""


class WidthError(FxpError, ArithmeticError):
    """An intermediate value of the reference left the width that was proved for it."""


class MissingDependencyError(FxpError, ImportError):
    """An optional package is needed; the message holds the command that installs it."""
