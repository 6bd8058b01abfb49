"""The errors a user can meet.

Owns: one exception class per kind of mistake. The text of an error is one sentence that says what is wrong, where, and
what to do about it; the command line prints it after `error:` and leaves with `exit_code`. Knows nothing of who raises.
"""

from __future__ import annotations


class StateOfGptError(Exception):
    """Something the user can put right. Anything that is not a subclass of this is a bug of ours."""

    exit_code = 2


class ConfigError(StateOfGptError):
    """A setting that does not exist, or a value it cannot take."""


class DataError(StateOfGptError):
    """A corpus, a demonstration or a ranking that cannot be used; names the file, and the line where there is one."""


class CheckpointError(StateOfGptError):
    """A checkpoint that is missing, incomplete or not what was saved."""


class RunError(StateOfGptError):
    """A run folder that cannot be opened, written or continued."""


class ModelError(StateOfGptError):
    """A model that cannot do what is asked of it."""


class ServeError(StateOfGptError):
    """The server cannot start or cannot answer."""


class ToolError(StateOfGptError):
    """A tool was called with something it cannot work on."""


class FeedbackError(StateOfGptError):
    """Feedback that cannot be stored, or too little of it to learn from."""


class InterruptedRun(KeyboardInterrupt):
    """The run was asked to stop. A KeyboardInterrupt, so that whoever handles Ctrl-C handles SIGTERM; and, like it, no
    Exception: `except Exception` in a library (`shutil.rmtree(ignore_errors=True)` has one) must not swallow it."""

    def __init__(self, message: str = "stopped; the same command continues", exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code
