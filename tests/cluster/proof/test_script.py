"""Scripts of faults are data, by their seed; a failing one is shortened to what makes it fail."""

import itertools
import math

import pytest

from cluster.proof.disturbed_run import OWN
from cluster.proof.script import FAULT_KINDS, STRIDE, USUAL, choose_kinds, kind_name, script, shrink, steps_of_script, too_late
from cluster.runtime.faults import KINDS, Fault

STAGES = ("autoencoder", "diffusion")
ALL = list(FAULT_KINDS)


def test_a_script_is_a_function_of_its_seed() -> None:
    steps = steps_of_script(ALL, STAGES)
    assert script(3, ALL, steps, hosts=3) == script(3, ALL, steps, hosts=3)
    assert len({tuple(script(seed, ALL, steps, hosts=3)) for seed in range(20)}) == 20
    assert script(7, ["kill", "s3_30s"], steps_of_script(["kill", "s3_30s"], STAGES), hosts=2) == [
        Fault("cut_store", 20, "autoencoder", 1, 30),
        Fault("kill", 94, "autoencoder", 1, math.inf),
    ], "golden: what a seed once stood for it stands for"


@pytest.mark.parametrize("count", [1, 2, 5, 15])
def test_the_faults_of_a_script_come_one_after_the_other_with_room_between_and_behind_them(count: int) -> None:
    steps = steps_of_script(ALL[:count], STAGES)
    faults = script(0, ALL[:count], steps, hosts=2)
    assert sorted(kind_name(fault) for fault in faults) == sorted(ALL[:count])
    assert all(0 < fault.step <= steps[fault.stage] - STRIDE / 2 and fault.rank in (0, 1) for fault in faults), "while all ranks are there"
    moments = [fault.step + steps["autoencoder"] * (fault.stage == "diffusion") for fault in faults]
    moments.append(2 * steps["diffusion"])
    assert all(later - earlier > STRIDE / 2 for earlier, later in itertools.pairwise(moments))


def test_a_fast_run_is_longer_where_it_goes_on_during_a_fault() -> None:
    assert steps_of_script(["kill"], STAGES, speed=200) == dict.fromkeys(STAGES, 4 * 200), "a fast run has not ended before it is seen"
    assert steps_of_script(["kill"], STAGES, speed=20) == {"autoencoder": STRIDE, "diffusion": STRIDE}
    assert steps_of_script(["kill", "s3_30s"], STAGES, speed=20)["diffusion"] == 2 * (STRIDE + 20 * 30 / 4)


def test_a_fault_that_is_late_is_not_done_to_ranks_that_are_about_to_end() -> None:
    steps = {"autoencoder": 160, "diffusion": 160}
    assert not too_late(steps, "autoencoder", 140)
    assert too_late(steps, "autoencoder", 141)


def test_a_drain_comes_to_the_host_of_rank_0() -> None:
    assert {script(seed, ["drain"], steps_of_script(["drain"], STAGES), hosts=4)[0].rank for seed in range(10)} == {0}


def test_kinds_are_chosen_by_name_or_by_the_seed() -> None:
    assert choose_kinds("kill,kill,stop", 0, hosts=True) == ["kill", "kill", "stop"]
    assert choose_kinds("all", 0, hosts=True) == ALL
    assert len(set(choose_kinds("", 4, hosts=True))) == USUAL and choose_kinds("", 4, hosts=True) == choose_kinds("", 4, hosts=True)
    assert choose_kinds("all", 0, hosts=False) == ["kill", "kill_driver", "stop", "second_driver", "frozen_driver"]
    with pytest.raises(ValueError, match="there is no kind of fault 'kil'; did you mean kill"):
        choose_kinds("kil", 0, hosts=True)
    with pytest.raises(ValueError, match="power_off needs hosts that this command has made itself"):
        choose_kinds("kill,power_off", 0, hosts=False)


def test_every_kind_is_there_and_can_be_done() -> None:
    assert {*FAULT_KINDS} == set(
        "kill kill_raylet power_off link_20s link_lost kill_driver restart_head drain stop s3_30s wrong_bytes disk_full out_of_memory "
        "nan_gradient second_driver frozen_driver".split()
    )
    assert {kind.does for kind in FAULT_KINDS.values()} <= {*KINDS, *OWN}


@pytest.mark.parametrize("guilty", [{"kill"}, {"drain"}, {"kill", "drain"}, {"stop", "link_20s", "out_of_memory"}])
def test_a_failing_script_shrinks_to_the_faults_that_make_it_fail(guilty: set[str]) -> None:
    faults, tried = script(1, ALL, steps_of_script(ALL, STAGES), hosts=3), []

    def fails(some: list[Fault]) -> bool:
        tried.append(some)
        return guilty <= {kind_name(fault) for fault in some}

    left = shrink(faults, fails)
    assert {kind_name(fault) for fault in left} == guilty and len(left) == len(guilty)
    assert left == [fault for fault in faults if fault in left], "in the order and at the moments they had"
    assert len(tried) <= 60, "each try is a run"


def test_a_script_that_fails_with_any_one_fault_shrinks_to_one() -> None:
    faults = script(1, ALL[:5], steps_of_script(ALL[:5], STAGES), hosts=2)
    assert len(shrink(faults, lambda some: bool(some))) == 1
    assert shrink(faults[:1], lambda some: pytest.fail("there is nothing to leave out")) == faults[:1]
