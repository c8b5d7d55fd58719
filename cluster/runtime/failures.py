"""What restarts what: the one table that decides whether lost work is started again, and what a command then ends with.

docs/architecture.md has the same table for people. An error of ours names its class by an attribute (`failure = "data"`), so this module
needs to import none of those who raise them; built-in exceptions, those of a store and those of Ray are listed in the table.
"""

import errno
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.storage import Permanent, StorageError

AGAIN = 75
"""Exit code (EX_TEMPFAIL of sysexits.h): the same command may go on by itself; a supervisor gives it again."""

PERSON = 1
"""Exit code: a person must act first."""


@dataclass(frozen=True)
class Failure:
    """A class of faults.

    Attributes:
        name: of the class.
        retried: whether we start the work again by ourselves, up to `run.retries` times without progress.
        advice: what to do when it has ended the run.
        signs: exceptions that show it and do not name it themselves.
        says: words of exceptions that show it, and have no class of their own.
        exit_code: of a command that it ended.
        free: whether starting again costs nothing of the budget, for nothing is wrong with the run.
        of_a_machine: whether the machine on which it showed may be to blame.
    """

    name: str
    retried: bool
    advice: str
    signs: tuple[type[BaseException] | str, ...] = ()
    exit_code: int = PERSON
    free: bool = False
    says: tuple[str, ...] = ()
    of_a_machine: bool = False


TABLE = (
    Failure("superseded", False, "nothing: the newer one goes on", exit_code=AGAIN),
    Failure("held", False, "wait for it, or end it", exit_code=AGAIN),
    Failure("data", False, "mend the file and give the same command again, or go on without: data.on_corrupt=quarantine"),
    Failure("non_finite", False, "look at the items named; lower optim.lr or set optim.clip, which makes another run"),
    Failure(
        "out_of_memory",
        False,
        "lower workers.micro_batch, set workers.recompute=true, raise workers.zero or workers.count, or set workers.offload; "
        "all of them may change in a run",
        (MemoryError, "OutOfMemoryError"),
        says=(
            *("DefaultCPUAllocator: can't allocate memory", "[Errno 12] Cannot allocate memory"),
            *("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Cuda failure 2 'out of memory'"),
        ),
    ),
    Failure(
        "device",
        False,
        "install a driver and a torch that fit the GPU, and give each rank a whole one; CUDA_LAUNCH_BLOCKING=1 shows where a device-side "
        "assert is; then the same command",
        says=(
            *("no kernel image is available", "driver version is insufficient", "driver on your system is too old"),
            *("device-side assert", "doesn't have NCCL built in", "no GPUs found", "Duplicate GPU detected"),
        ),
    ),
    Failure("refused", False, "correct the URL, or the credentials and their rights; then the same command", (Permanent,)),
    Failure("storage", True, "see to the store; the same command goes on", (StorageError,), AGAIN),
    Failure(
        "disk",
        True,
        "make room on that machine, or mend its disk (TMPDIR, data.cache); the same command goes on",
        exit_code=AGAIN,
        says=tuple(f"[Errno {code}]" for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)),
        of_a_machine=True,
    ),
    Failure(
        "user",
        False,
        "correct what the sentence names; then the same command",
        (ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError, ArithmeticError, NameError, NotImplementedError),
    ),
    Failure("hang", True, "look at the stacks in the run's folder; the same command goes on", (), AGAIN, of_a_machine=True),
    Failure("preempted", True, "the same command goes on", ("PreemptionError",), AGAIN, free=True),
    Failure("no_place", True, "the same command goes on when there is room", ("WorkerGroupStartupTimeoutError",), AGAIN, free=True),
    Failure(
        "lost",
        True,
        "see to the machine; the same command goes on",
        ("RayError", "WorkerHealthCheckFailedError", "AcceleratorError", "DistBackendError"),
        AGAIN,
        says=("CUDA error:", "CUDNN_STATUS_", "CUBLAS_STATUS_", "NCCL error"),
        of_a_machine=True,
    ),
)
"""In order of precedence: when one rank fails, its peers fail too, of a broken connection. A name stands for a class of Ray or torch."""

GUESSES = (
    *(" Some common causes include", " This is typically caused by"),
    *("\nSearch for `cuda", "\nCUDA kernel errors might be asynchronously reported"),
)
"""Where what Ray, gloo and CUDA know of an error ends, and what may have caused it, or tells more, begins."""

PREEMPTED = next(failure for failure in TABLE if failure.name == "preempted")
"""A machine was taken away that had said so."""

LOST = TABLE[-1]
"""A worker, its machine, its GPU or the cluster is gone: what remains when no rank names another reason."""

USER = next(failure for failure in TABLE if failure.name == "user")
"""A mistake: no try can succeed."""

SAME = 3
"""So many times the same error that nobody expects, without progress in between, are a mistake: of what passes by itself the text, the rank
or the moment would be another. Once it may be anything, and after the second time a machine that is to blame is left out."""

TOLD = ("peer", "connect", "socket", "gloo", "c10d", "nccl", "store->", "timed out", "timeout", "broken pipe", "unreachable", "no route to")
"""Words of errors that follow from a lost peer, or a lost way to it, in small letters."""


class StageFailed(RuntimeError):
    """A step of a run ended without reaching its end.

    Attributes:
        stage: its name.
        failure: the row of the failure table.
        cause: the error that showed it.
        where: host, rank and step, as far as they are known.
        tried: what was done about it before.
    """

    def __init__(self, stage: str, failure: Failure, cause: BaseException, where: str = "", tried: str = ""):
        super().__init__(stage, failure, cause, where, tried)
        self.stage, self.failure, self.cause, self.where, self.tried = stage, failure, cause, where, tried

    @property
    def what(self) -> str:
        """What happened, in a sentence."""
        return f"stage {self.stage} failed ({self.failure.name}){self.where and ', '}{self.where}: {_sentence(self.cause)}"

    def __str__(self) -> str:
        advice = getattr(self.cause, "advice", "") or self.failure.advice
        return f"{self.what}. {self.tried}{self.tried and '. '}What to do: {advice}"


class Budget:
    """How often each class of failure may still be started again; progress refills it."""

    def __init__(self, retries: int):
        self._retries, self._spent, self._seen = retries, Counter[str](), Counter[str]()

    def allows(self, failure: Failure) -> bool:
        """Spend one retry of this class, unless there is none left."""
        if not failure.retried:
            return False
        if not failure.free:
            self._spent[failure.name] += 1
        return self._spent[failure.name] <= self._retries

    def repeated(self, error: BaseException) -> bool:
        """Take an error of a rank; whether it is one that nobody expects, and has now come SAME times without progress."""
        if failure_of(error) or of_a_peer(error) or _of_ray(error):
            return False
        self._seen[text := f"{type(error).__name__}: {error}"] += 1
        return self._seen[text] >= SAME

    def refill(self) -> None:
        """The work got further than it ever was."""
        self._spent.clear()
        self._seen.clear()

    def __str__(self) -> str:
        spent = [f"{count} of {self._retries} for {name}" for name, count in self._spent.items()]
        return f"retries without progress: {', '.join(spent)}" if spent else "no retries spent"


def classify(errors: Iterable[BaseException]) -> tuple[Failure, BaseException]:
    """The class of a worker group's failure and the error that shows it: the first of the table that any rank shows.

    Of several that show it, the cause is the first that tells of no peer, and of what Ray and the ranks say rather what a rank says: NCCL's
    errors show a class of their own, and peers of whoever failed raise them, too.

    Args:
        errors: what the ranks raised, at least one.
    """
    found = [inner(error) for error in errors]
    failure = next((row for row in TABLE if any(_shows(error, row) for error in found)), LOST)
    able = found if failure is LOST else [error for error in found if _shows(error, failure)]
    return failure, min(able, key=lambda error: (of_a_peer(error), not _shows(error, failure), _of_ray(error)))


def failure_of(error: BaseException) -> Failure | None:
    """The class that an error shows by itself, None for one that nobody expects: a mistake in the program."""
    return next((failure for failure in TABLE if _shows(inner(error), failure)), None)


def of_a_peer(error: BaseException) -> bool:
    """Whether an error follows from a lost peer, or a lost way to it, as far as its words tell: whoever raised it has nothing.

    Ray's errors speak of connections, too, but of its own to the rank itself.
    """
    if _of_ray(error):
        return False
    return isinstance(error, ConnectionError | TimeoutError | EOFError) or any(word in str(error).lower() for word in TOLD)


def exit_code(error: BaseException) -> int:
    """What a command ends with that this error ended."""
    return error.failure.exit_code if isinstance(error, StageFailed) else classify([error])[0].exit_code


def paragraph(error: BaseException) -> str:
    """What a command says of an error that ended it: class, cause, and what to do; of an error that is a sentence already, that."""
    failure = failure_of(error)
    if failure is None or failure.name in ("user", "superseded", "held") or isinstance(error, StorageError | StageFailed):
        return str(error)
    return f"({failure.name}) {_sentence(inner(error))}. What to do: {getattr(error, 'advice', '') or failure.advice}"


def inner(error: BaseException) -> BaseException:
    """What Ray Train's or Ray's error is about."""
    return getattr(error, "controller_failure", None) or getattr(error, "_base_exc", None) or error


def _of_ray(error: BaseException) -> bool:
    return any(kind.__name__ in ("RayError", "RayTrainError") for kind in type(error).__mro__)


def _shows(error: BaseException, failure: Failure) -> bool:
    if isinstance(name := getattr(error, "failure", None), str):
        return name == failure.name
    types = tuple(sign for sign in failure.signs if not isinstance(sign, str))
    named = any(kind.__name__ in failure.signs for kind in type(error).__mro__)
    return isinstance(error, types) or named or any(words in str(error) for words in failure.says)


def _sentence(error: BaseException) -> str:
    text = str(error)
    for guess in GUESSES:
        text = text.partition(guess)[0]
    return f"{type(error).__name__}: {(text.strip() or 'no message').splitlines()[-1].strip().rstrip('.')}"
