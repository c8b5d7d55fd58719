"""What a machine costs, and the share of it that a worker holds."""

import pytest

from cluster.runtime.prices import price_of, share_of


@pytest.mark.parametrize(
    "labels, prices, dollars",
    [
        ({"instance-type": "g5.12xlarge"}, {}, 5.672),
        ({"instance-type": "g5.12xlarge", "market-type": "on-demand"}, {}, 5.672),
        ({"instance-type": "g5.12xlarge", "market-type": "spot"}, {}, None),
        ({"instance-type": "g5.12xlarge", "ray.io/market-type": "spot"}, {"g5.12xlarge": 2.0}, 2.0),
        ({"node.kubernetes.io/instance-type": "m6i.large"}, {}, 0.096),
        ({"instance-type": "z9.nano"}, {}, None),
        ({"instance-type": "z9.nano"}, {"any": 1.5}, 1.5),
        ({}, {"any": 1.5}, 1.5),
        ({}, {}, None),
        ({"pool": "gpu", "instance-type": "g5.12xlarge"}, {"gpu": 2.0}, 2.0),
        ({"pool": "gpu", "instance-type": "g5.12xlarge"}, {"gpu": 2.0, "g5.12xlarge": 3.0}, 3.0),
        ({"instance-type": "m6i.large"}, {"any": 1.5, "m6i.large": 0.0}, 0.0),
    ],
)
def test_the_configuration_has_the_last_word_and_spot_has_no_list_price(
    labels: dict[str, str], prices: dict[str, float], dollars: float | None
) -> None:
    assert price_of(labels, prices) == dollars


@pytest.mark.parametrize(
    "resources, total, share",
    [
        ({"CPU": 1.0}, {"CPU": 4.0}, 0.25),
        ({"CPU": 4.0, "GPU": 1.0}, {"CPU": 48.0, "GPU": 4.0}, 0.25),
        ({"CPU": 24.0, "GPU": 1.0}, {"CPU": 48.0, "GPU": 4.0}, 0.5),
        ({"CPU": 8.0}, {"CPU": 4.0}, 1.0),
        ({"CPU": 1.0, "memory": 1e9}, {"memory": 2e9}, 0.0),
    ],
)
def test_a_worker_holds_the_share_of_what_is_scarcer(resources: dict[str, float], total: dict[str, float], share: float) -> None:
    assert share_of(resources, total) == share
