"""Every error that a user can cause and mend. The file knows nothing heavy, so that all of it can be matched by class.

The command prints an error of these classes as one line, without a traceback. The message says what was wrong, where
(the file and the key), and what would be right. `analysis.errors` has those of tables of runs.
"""


class UserError(Exception):
    """What a person who uses varscale can mend."""


class ExperimentError(UserError, ValueError):
    """Something is wrong with an experiment or with an option: names the file and the key, or the flag."""


class DataError(UserError, ValueError):
    """Something is wrong with the images: names the file, the row or the column."""


class TokenStoreError(DataError):
    """Something is wrong with a token store: names the file and the key."""


class CheckpointError(UserError, ValueError):
    """A file of weights, or a checkpoint, can't be used: it is missing, damaged, foreign or of other settings."""


class SweepError(UserError, RuntimeError):
    """Why a sweep can't go on. What is finished is kept."""


class TokenizerRejected(SweepError):
    """No model should be trained on a tokenizer, by its own figures; `tokenizer.accept` goes on regardless."""


class Diverged(UserError, RuntimeError):
    """The loss of a training is not a number, or infinite."""


class TrackingError(UserError, ValueError):
    """A tracking URI or an MLflow experiment that can't be used."""


class ExperimentDeletedError(TrackingError):
    """The user deleted an experiment in MLflow; others may be delivered still."""
