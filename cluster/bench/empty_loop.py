"""The least that trains under Ray Train: torch and nothing else, AdamW on a layer of 8x8. Run as a program: what `startup` measures beside.

python cluster/bench/empty_loop.py RANKS FILE: the Unix times of its first and its last step go to FILE.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model

STEPS = 20


def loop(config: dict[str, Any]) -> None:
    """What a rank does."""
    layer = prepare_model(torch.nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(layer.parameters())
    times = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        layer(torch.ones(8)).sum().backward()
        optimizer.step()
        times.append(time.time())
    Path(config["file"]).write_text(f"{times[0]} {times[-1]}")


if __name__ == "__main__":
    TorchTrainer(loop, train_loop_config={"file": sys.argv[2]}, scaling_config=ScalingConfig(num_workers=int(sys.argv[1]))).fit()
