"""What an autoscaler may start, as its configuration says. Ray's own is asked in tests/cluster/driver/test_machines_come_and_go.py."""

from cluster.runtime.autoscaler import Autoscaler, MachineType, parsed

TYPES = {
    "head": {"resources": {"CPU": 4}, "max_workers": 0},
    "gpu": {"resources": {"CPU": 8, "GPU": 1, "memory": 64e9}, "max_workers": 4, "labels": {"pool": "gpu"}},
    "cpu": {"resources": {"CPU": 2}},
}


def config(types: dict) -> dict:
    return {"max_workers": 6, "head_node_type": "head", "available_node_types": types}


def test_types_have_their_own_limit_and_that_of_all_and_the_head_does_not_come_again() -> None:
    scaler = parsed(config(TYPES))
    gpu = MachineType("gpu", {"CPU": 8.0, "GPU": 1.0, "memory": 64e9}, 4, {"pool": "gpu"})
    assert scaler.types == (gpu, MachineType("cpu", {"CPU": 2.0}, 6))
    assert scaler.most == 6 and [node.labels for node in scaler.machines()] == 4 * [{"pool": "gpu"}] + 6 * [{}]


def test_what_each_type_tells_may_be_asked_for() -> None:
    assert parsed(config(TYPES)).counts == {"CPU"}
    assert parsed(config({"head": {}, "gpu": TYPES["gpu"]})).counts == {"CPU", "GPU", "memory"}


def test_of_types_whose_resources_are_not_told_nothing_is_known() -> None:
    assert parsed(config({**TYPES, "other": {"max_workers": 3}})) == Autoscaler() == parsed({})
    assert Autoscaler().counts == set()
