"""Which faults of a store start the workers again: what a real server says, as the table takes it."""

import pytest

from cluster.runtime.failures import classify
from cluster.storage import StorageError, Store, open_store, s3
from tests.cluster.support.faulty import faulty_proxy


def met(store: Store, key: str = "x") -> str:
    """The class of a group's failure in which one rank met this error and the others the end of their connections."""
    with pytest.raises(StorageError) as caught:
        store.read(key)
    failure, cause = classify([ConnectionResetError("a peer"), caught.value])
    assert cause is caught.value and f"{store.url}/{key}" in str(cause)
    return f"{failure.name}, {'retried' if failure.retried else 'final'}"


def test_what_is_not_there_or_not_allowed_ends_a_run_at_once(store: Store, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert met(store) == "refused, final"
    assert met(open_store("s3://nobody-made-this/y")) == "refused, final"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert met(open_store(s3_url)) == "refused, final"


def test_credentials_that_have_expired_end_a_run(s3_url: str, object_store, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_proxy(object_store.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.faults = ["expired"] * 10
        assert met(open_store(s3_url)) == "refused, final"


def test_a_folder_that_may_not_be_read_ends_a_run(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    store.put("x", b"1")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)  # tests may run as root, whom no mode keeps out
    assert met(store) == "refused, final"


@pytest.mark.parametrize("fault", ["down", "busy"])
def test_a_server_that_does_not_answer_is_tried_again(fault: str, s3_url: str, object_store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "FIRST_RETRY_SECONDS", 0.0)
    with faulty_proxy(object_store.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.faults = [fault] * 10
        assert met(open_store(s3_url)) == "storage, retried"
        assert proxy.happened == [fault] * 2
