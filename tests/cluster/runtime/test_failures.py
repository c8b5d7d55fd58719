"""Which faults of a store start the workers again: what a real server says, as the table takes it."""

import errno
import os
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerHealthCheckFailedError

from cluster.runtime import failures
from cluster.runtime.failures import Budget, StageFailed, classify, exit_code, failure_of, of_a_peer
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


def test_credentials_that_were_forgotten_end_a_run(s3_url: str, object_store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "FIRST_RETRY_SECONDS", 0.0)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert met(open_store(s3_url)) == "refused, final"
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError) as caught:
        open_store(s3_url)
    assert failure_of(caught.value) is row("refused") and exit_code(caught.value) == 1


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
    monkeypatch.setattr(s3, "RETRY_SECONDS", 0.0)
    with faulty_proxy(object_store.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.faults = [fault] * 10
        assert met(open_store(s3_url)) == "storage, retried"
        assert proxy.happened == [fault], "asked once, and not again by boto3"


class Tracked(RuntimeError):
    """An error that names its class."""

    failure = "hang"


def test_a_budget_is_of_each_class_refilled_by_progress_and_not_spent_by_notices() -> None:
    budget, hang, lost, notice = Budget(2), failure_of(Tracked()), failures.LOST, row("preempted")
    assert hang is not None and [budget.allows(hang) for _ in range(3)] == [True, True, False]
    assert [budget.allows(lost) for _ in range(3)] == [True, True, False]
    assert all(budget.allows(notice) for _ in range(100))
    budget.refill()
    assert budget.allows(hang) and budget.allows(lost)
    assert not Budget(100).allows(row("data"))


def test_ray_s_own_errors_stand_in_the_table() -> None:
    from ray.exceptions import OutOfMemoryError
    from ray.train import PreemptionError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    assert classify([ControllerError(WorkerGroupStartupTimeoutError(3))])[0].name == "no_place"
    assert failure_of(OutOfMemoryError("killed")).name == "out_of_memory"
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 50)
    assert failure_of(refused.value).name == failure_of(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))).name == "out_of_memory"
    assert failure_of(ActorDiedError()).name == "lost"
    assert failure_of(PreemptionError(SimpleNamespace(preempted_ranks=[1]))).name == "preempted"
    assert failure_of(RuntimeError("a mistake of ours")) is None and classify([RuntimeError("broken pipe")])[0] is failures.LOST


def test_a_command_ends_with_75_where_the_same_one_may_go_on_and_with_1_where_a_person_must_act() -> None:
    codes = {one.name: one.exit_code for one in failures.TABLE}
    again = {"lost", "storage", "disk", "no_place", "held", "superseded", "hang", "preempted"}
    assert {name for name, code in codes.items() if code == 75} == again and set(codes.values()) == {1, 75}
    assert exit_code(StageFailed("diffusion", failures.LOST, OSError())) == 75 and exit_code(ValueError("a key")) == 1


def test_a_failure_is_one_paragraph_that_says_class_place_cause_what_was_done_and_what_to_do() -> None:
    where = "rank 1, host h2, after step 75 (600 items)"
    text = str(StageFailed("diffusion", failures.LOST, RuntimeError("a\nlong story."), where, "tried 3 times"))
    assert text == (
        "stage diffusion failed (lost), rank 1, host h2, after step 75 (600 items): RuntimeError: long story. tried 3 times. "
        "What to do: see to the machine; the same command goes on"
    )


PARAGRAPHS = {
    "superseded": "nothing: the newer one goes on",
    "held": "wait for it, or end it",
    "data": "mend the file and give the same command again, or go on without: data.on_corrupt=quarantine",
    "non_finite": "look at the items named; lower optim.lr or set optim.clip, which makes another run",
    "out_of_memory": (
        "lower workers.micro_batch, set workers.recompute=true, raise workers.zero or workers.count, or set workers.offload; "
        "all of them may change in a run"
    ),
    "device": (
        "install a driver and a torch that fit the GPU, and give each rank a whole one; CUDA_LAUNCH_BLOCKING=1 shows where a device-side "
        "assert is; then the same command"
    ),
    "refused": "correct the URL, or the credentials and their rights; then the same command",
    "storage": "see to the store; the same command goes on",
    "disk": "make room on that machine, or mend its disk (TMPDIR, data.cache); the same command goes on",
    "user": "correct what the sentence names; then the same command",
    "hang": "look at the stacks in the run's folder; the same command goes on",
    "preempted": "the same command goes on",
    "no_place": "the same command goes on when there is room",
    "lost": "see to the machine; the same command goes on",
}


def test_each_class_has_its_paragraph() -> None:
    """Class, host, rank, progress, cause, what was done and what to do."""
    place, tried = "rank 1, host h2 (10.0.0.2), after step 75 (600 items)", "retries without progress: 3 of 3 for it"
    said = {one.name: str(StageFailed("diffusion", one, RuntimeError("why"), place, tried)) for one in failures.TABLE}
    assert said == {
        name: f"stage diffusion failed ({name}), {place}: RuntimeError: why. {tried}. What to do: {advice}"
        for name, advice in PARAGRAPHS.items()
    }


def row(name: str) -> failures.Failure:
    return next(one for one in failures.TABLE if one.name == name)


def test_of_a_group_that_lost_a_rank_the_lost_one_is_named_and_guesses_of_libraries_are_left_out() -> None:
    gone = WorkerHealthCheckFailedError("its process has died. End of file. Some common causes include: (1) many", failure=ValueError())
    peer = RuntimeError("Connection closed by peer [127.0.0.1]:1. This is typically caused by a remote worker crashing.")
    failure, cause = classify([peer, gone])
    assert failure.name == "lost" and cause is gone
    what = StageFailed("diffusion", failure, gone).what
    assert what == "stage diffusion failed (lost): WorkerHealthCheckFailedError: its process has died. End of file"
    assert "typically" not in StageFailed("diffusion", *classify([peer])).what


def test_a_mistake_of_the_program_is_not_taken_for_a_lost_machine() -> None:
    for mistake in (IndexError("list index out of range"), ZeroDivisionError(), NameError("x"), NotImplementedError()):
        failure, cause = classify([RuntimeError("Connection closed by peer"), mistake])
        assert (failure.name, failure.retried, failure.exit_code, cause) == ("user", False, 1, mistake)


@pytest.mark.parametrize(
    "mistake",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 5x2)"),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/cache"),
    ],
)
def test_an_error_that_comes_again_and_again_the_same_is_a_mistake_and_no_lost_machine(mistake: Exception) -> None:
    budget = Budget(9)
    assert classify([mistake])[0] is failures.LOST, "once it may have been anything"
    assert [budget.repeated(mistake) for _ in range(failures.SAME)] == [*[False] * (failures.SAME - 1), True]
    budget.refill()
    assert not budget.repeated(mistake), "the work got further in between"
    assert not any(Budget(9).repeated(RuntimeError(f"another one, {number}")) for number in range(9))


TOLD = [
    RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
    RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete"),
    torch.distributed.DistNetworkError("The client socket has timed out after 600000ms while trying to connect to (10.0.0.1, 29500)."),
    torch.distributed.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0//cuda//0"),
    RuntimeError("[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by store->get('0')"),
    OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH)),
    BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)),
    EOFError(),
]
"""How ranks hear that a peer, or the way to it, is gone."""


def test_what_is_known_to_follow_from_a_lost_peer_is_never_taken_for_a_mistake_however_often_it_comes() -> None:
    for told in TOLD:
        budget = Budget(99)
        assert classify([told])[0] is failures.LOST and not any(budget.repeated(told) for _ in range(99)), told
    known = WorkerHealthCheckFailedError("its process has died", failure=ValueError())
    budget = Budget(99)
    assert not any(budget.repeated(known) for _ in range(99)), "a process that dies each time may have a machine to blame"
    start = WorkerGroupStartupFailedError("Failed to start the worker group")
    assert classify([start])[0] is failures.LOST and not any(budget.repeated(start) for _ in range(99)), "nor is it the program"


def test_of_an_error_that_nobody_expects_and_its_peers_connections_the_error_is_the_cause() -> None:
    mistake = RuntimeError("a shape")
    assert classify([*TOLD[:4], mistake, TOLD[4]]) == (failures.LOST, mistake)


MORE = """
Search for `cudaErrorECCUncorrectable' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more information.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
"""
"""What torch adds to an error of CUDA."""

ON_A_CARD = {
    "out_of_memory": [
        torch.AcceleratorError(f"CUDA error: out of memory{MORE}"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    "device": [
        torch.AcceleratorError(f"CUDA error: no kernel image is available for execution on the device{MORE}"),
        torch.AcceleratorError("CUDA error: CUDA driver version is insufficient for CUDA runtime version"),
        RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"),
        torch.AcceleratorError(f"CUDA error: device-side assert triggered{MORE}"),
        RuntimeError("Distributed package doesn't have NCCL built in"),
        ValueError("ProcessGroupNCCL is only supported with GPUs, no GPUs found!"),
        torch.distributed.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:77, invalid usage\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"
        ),
    ],
    "lost": [
        torch.AcceleratorError(f"CUDA error: uncorrectable ECC error encountered{MORE}"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:77, unhandled system error"),
    ],
}


def test_what_a_gpu_says_has_a_class_also_where_its_peers_lost_their_connection() -> None:
    peer = torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1.")
    for name, errors in ON_A_CARD.items():
        assert [failure_of(error).name for error in errors] == [name] * len(errors)
        for error in errors:
            failure, cause = classify([peer, error])
            assert failure.name == name and (cause is error or of_a_peer(error)), "who only heard of it has nothing to tell"
            if name != "lost":  # of a group that does not even start Ray Train's controller tells
                wrapped = ControllerError(RayTaskError("on_start", f"Traceback\n{error}", error).as_instanceof_cause())
                assert classify([wrapped])[0].name == name
    said = StageFailed("diffusion", *classify([ON_A_CARD["lost"][0]])).what
    assert said == "stage diffusion failed (lost): AcceleratorError: CUDA error: uncorrectable ECC error encountered"


def test_the_cause_is_what_a_rank_says_itself_rather_than_what_its_peers_or_ray_say_of_it() -> None:
    peer, gone = torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1."), ActorDiedError()
    ecc, mistake = ON_A_CARD["lost"][0], RuntimeError("a shape")
    for cause, *errors in ((ecc, peer, gone, ecc), (gone, peer, gone), (mistake, peer, mistake), (gone, mistake, gone), (peer, peer)):
        found = classify(errors)
        assert found[0] is failures.LOST and found[1] is cause


def test_a_full_or_broken_disk_of_one_machine_is_tried_again() -> None:
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        failure = failure_of(OSError(code, os.strerror(code), "/tmp/scratch"))
        assert failure is not None and (failure.name, failure.retried, failure.exit_code) == ("disk", True, 75)
    assert failure_of(OSError(errno.ENOENT, os.strerror(errno.ENOENT))) is None
