"""What restarts what: the one table that decides whether a lost worker group is started again.

docs/architecture.md has the same table for people. An error of ours names its class by an attribute (`failure = "data"`), so this module
needs to import none of those who raise them; built-in exceptions and those of a store are listed in the table.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.storage import Permanent, StorageError


@dataclass(frozen=True)
class Failure:
    """A class of faults.

    Attributes:
        name: of the class.
        retried: whether we start the workers again, up to `run.retries` times.
        signs: exceptions that show it and do not name it themselves.
    """

    name: str
    retried: bool
    signs: tuple[type[BaseException], ...] = ()


TABLE = (
    Failure("superseded", False),  # a newer life goes on
    Failure("held", False),  # another driver is at it
    Failure("data", False),  # a checksum differs
    Failure("non_finite", False),  # a loss is not a number any more
    Failure("out_of_memory", False, (MemoryError,)),  # and torch's OutOfMemoryError
    Failure("refused", False, (Permanent,)),  # the store says no
    Failure("storage", True, (StorageError,)),  # after the store's own retries
    Failure("user", False, (ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError)),
)
"""In order of precedence: when one rank fails, its peers fail too, of a broken connection."""

LOST = Failure("lost", True)
"""A worker or its machine is gone: what remains when no rank names another reason."""


class StageFailed(RuntimeError):
    """A stage ended without reaching its end.

    Attributes:
        stage: its name.
        failure: the row of the failure table.
        cause: the error that showed it.
    """

    def __init__(self, stage: str, failure: Failure, cause: BaseException):
        super().__init__(stage, failure, cause)
        self.stage, self.failure, self.cause = stage, failure, cause

    def __str__(self) -> str:
        advice = getattr(self.cause, "advice", "")
        return f"stage {self.stage} failed ({self.failure.name}): {_sentence(self.cause)}{advice and '. '}{advice}"


def classify(errors: Iterable[BaseException]) -> tuple[Failure, BaseException]:
    """The class of a worker group's failure and the error that shows it: the first of the table that any rank shows.

    Args:
        errors: what the ranks raised, at least one.
    """
    found = list(errors)
    for failure in TABLE:
        for error in found:
            if _shows(error, failure):
                return failure, error
    return LOST, found[0]


def _shows(error: BaseException, failure: Failure) -> bool:
    if isinstance(name_fields := getattr(error, "failure", None), str):
        return name_fields == failure.name
    return isinstance(error, failure.signs) or (failure.name == "out_of_memory" and type(error).__name__ == "OutOfMemoryError")


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else 'no message'}"
