"""What a command says of an error that ended it, and what it ends with."""

import pytest
from ray.exceptions import NodeDiedError, OutOfMemoryError

from cluster import cli
from cluster.runs.checkpoint import DamagedCheckpoint
from cluster.runs.state import Superseded
from cluster.runtime.placement import NoPlace
from cluster.runtime.tasks import TaskLost
from cluster.storage import StorageError

LOST = "error: (lost) {}. What to do: see to the machine; the same command goes on"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("workers.count is 0"), 1, "error: workers.count is 0"),
        (StorageError("s3://lab does not answer"), 75, "error: s3://lab does not answer"),
        (ConnectionError("there is no Ray"), 75, "error: there is no Ray"),
        (Superseded("life 2 has begun"), 75, "error: life 2 has begun"),
        (TaskLost("evaluate: its machine is gone", NodeDiedError("gone")), 75, LOST.format("TaskLost: evaluate: its machine is gone")),
        (TaskLost("evaluate: killed", OutOfMemoryError("too much")), 1, "error: (out_of_memory) TaskLost: evaluate: killed. What to do:"),
        (NodeDiedError("the node died"), 75, "error: (lost) NodeDiedError: "),
        (NoPlace("no room in an hour"), 75, "error: (no_place) NoPlace: no room in an hour. What to do: the same command goes on when"),
        (DamagedCheckpoint("a part is missing"), 75, "error: (storage) DamagedCheckpoint: a part is missing. What to do: see to the store"),
    ],
)
def test_an_error_of_a_class_is_one_paragraph_and_an_exit_code(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise error

    assert cli.run(main) == code
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("error", [KeyError("a mistake"), RuntimeError("nobody expected it")])
def test_a_mistake_of_the_program_shows_where_it_is(error: Exception) -> None:
    def main() -> int:
        raise error

    with pytest.raises(type(error)):
        cli.run(main)
