"""What the driver sees of Ray Train, beside the ranks' numbers."""

from tests.tiny import Trained


def test_no_stage_begins_with_an_error_of_ray_s_core(trained: Trained) -> None:
    said = trained.stdout + trained.stderr
    assert "PreemptionWatcher" not in said and "core_worker" not in said
