"""Who brings what back: the one table that decides whether a lost worker group is started again.

fault            | detected by                      | brought back by
-----------------|----------------------------------|----------------------------------------------
worker, machine  | Ray (actor death), peers (gloo)  | us, at once, up to run.retries times
refused          | Permanent, of a store's answer   | the same command with another URL or other credentials
storage          | StorageError after its own tries | us, up to run.retries times
out of memory    | the allocator or Ray             | the same command with a smaller workers.micro_batch
data             | CRC32C, decoding                 | the same command once the data is mended, or with data.on_corrupt=quarantine
non-finite       | the step's all-reduce            | the same command with other settings
superseded       | a newer life                     | nobody: the newer life goes on
user             | checks before and in the workers | the same command, corrected
driver, head     | the scheduler, the user          | the same command again
"""

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.data.shards import CorruptData
from cluster.runs.state import Superseded
from cluster.storage import Permanent, StorageError


class NonFinite(RuntimeError):
    """A loss or gradient is not a number any more; names the items of the step."""


@dataclass(frozen=True)
class Failure:
    """A class of faults: its name, the exceptions that show it, whether we start the workers again."""

    name: str
    signs: tuple[type[BaseException], ...]
    retried: bool


TABLE = (
    Failure("superseded", (Superseded,), False),
    Failure("data", (CorruptData,), False),
    Failure("non_finite", (NonFinite,), False),
    Failure("out_of_memory", (MemoryError,), False),
    Failure("refused", (Permanent,), False),
    Failure("storage", (StorageError,), True),
    Failure("user", (ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError), False),
)
LOST = Failure("lost", (), True)
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
        an_item = isinstance(self.cause, CorruptData) and self.cause.clip
        advice = ". Then the same command goes on; data.on_corrupt=quarantine trains without damaged clips, and scores none"
        return f"stage {self.stage} failed ({self.failure.name}): {_sentence(self.cause)}{advice if an_item else ''}"


def classify(errors: Iterable[BaseException]) -> tuple[Failure, BaseException]:
    """The class of a worker group's failure and the error that shows it.

    When one rank fails, its peers fail too, of a broken connection: the first class of the table that any rank shows wins.

    Args:
        errors: what the ranks raised, at least one.
    """
    found = list(errors)
    for failure in TABLE:
        for error in found:
            if isinstance(error, failure.signs) or (failure.name == "out_of_memory" and type(error).__name__ == "OutOfMemoryError"):
                return failure, error
    return LOST, found[0]


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else 'no message'}"
