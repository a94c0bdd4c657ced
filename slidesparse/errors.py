"""Errors that a user can act on: one line each, saying what is wrong, where, and what to do."""

from __future__ import annotations


class SlideSparseError(Exception):
    """Base of every error that the command line prints as one line, without a traceback."""

    exit_code = 1


class ConfigError(SlideSparseError):
    """`bench.yaml` or a command-line option is wrong (file, line, key, what is allowed)."""

    exit_code = 2


class CheckpointError(SlideSparseError):
    """A model folder is missing something, or holds something that it must not (file, tensor, layer)."""


class SourceError(SlideSparseError):
    """A model could not be had from its source (hub, local folder)."""


class VerificationError(SlideSparseError):
    """A result differs from its independent reference by more than the stated bound."""


class RecordError(SlideSparseError):
    """A record file cannot be read or written."""


class UnsupportedHere(SlideSparseError):
    """This machine cannot run a cell (hardware or library missing): the cell is skipped with this reason."""


class DiskError(SlideSparseError):
    """The disk is full or cannot be written: nothing more can be recorded, so the run ends here."""


class ContextLost(SlideSparseError):
    """A kernel has crashed the GPU context of this process: what was measured is kept, a new process goes on."""
