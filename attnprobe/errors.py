"""The errors that attnprobe raises: one base, and one subclass for each thing that a caller can fix.

A message says what was wrong, with the actual shapes or names, and what to do about it. Bad input never
silently yields a wrong number. What is left to others: a bug inside attnprobe surfaces as a plain Python
exception.
"""


class AttnprobeWarning(UserWarning):
    """A result that is right, but that may well not mean what it seems to; the message says what to do."""


class AttnprobeError(Exception):
    """Base of every error that attnprobe raises on purpose."""


class BatchError(AttnprobeError, ValueError):
    """Token ids, masks or texts that do not form a valid batch."""


class PatternError(AttnprobeError, ValueError):
    """An attention pattern, or the inputs of an attention call, that cannot be right."""


class ParameterError(AttnprobeError, ValueError):
    """A window, horizon, quantile, layer or other parameter that makes no sense."""


class UnsupportedModelError(AttnprobeError, TypeError):
    """A model whose attention cannot be read; the message gives the reason."""


class ModelLoadError(AttnprobeError, OSError):
    """A model that cannot be found, read or downloaded."""


class IncompleteRunError(AttnprobeError, RuntimeError):
    """A forward pass in which a layer was not seen exactly once, or could not be read as before."""


class InterventionError(AttnprobeError, ValueError):
    """A replacement of a site's value, or a suppression of attention, that cannot be carried out."""


class ResultError(AttnprobeError, ValueError):
    """A result that cannot be saved, loaded or combined."""


class MissingDependencyError(AttnprobeError, ImportError):
    """A missing optional package that the requested feature needs."""


class TrainerError(AttnprobeError, RuntimeError):
    """A trainer that credit cannot be attached to or detached from; the message gives the reason."""
