"""Training does not load torch's compiler, and whoever wants it has it all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import ROOT

pytestmark = pytest.mark.starts

TRAIN = """
import os, sys, torch.distributed as dist
from tests.cluster.support.training import train_here
from tests.tiny import tiny
shards, folder = sys.argv[1:]
os.environ["LOCAL_RANK"] = "0"
dist.init_process_group("gloo", init_method=f"file://{folder}.rendezvous", rank=0, world_size=1)
train_here(0, 1, tiny(shards, folder, f"workers.zero={os.environ['ZERO']}"), folder, 1, "autoencoder")
print([name for name in ("torch._dynamo.eval_frame", "torch._inductor.compile_fx", "triton") if name in sys.modules])
dist.destroy_process_group()
"""

COMPILE = """
import sys, torch
from cluster.training.late_compiler import load_compiler_late
load_compiler_late()
torch.optim.SGD([torch.ones(1, requires_grad=True)])
before = "torch._dynamo.eval_frame" in sys.modules
compiled = torch.compile(lambda x: x + 1, backend="eager")
print(before, compiled(torch.ones(1)).item(), "torch._dynamo.eval_frame" in sys.modules)
"""


PARTS = """
import sys
from cluster.training.late_compiler import load_compiler_late
load_compiler_late()
import torch._dynamo.config as config
import torch._dynamo.utils
from torch._dynamo import exc
import torch
print(config is torch._dynamo.config, config is torch._dynamo.utils.config, exc is sys.modules["torch._dynamo.exc"])
"""


def said(code: str, *arguments: str | Path, zero: int = 1) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"ZERO": str(zero)}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_whole_stage_is_trained_without_it(zero: int, shards: Path, tmp_path: Path) -> None:
    assert said(TRAIN, shards, tmp_path / "run", zero=zero) == "[]"


def test_who_compiles_gets_it() -> None:
    assert said(COMPILE) == "False 2.0 True"


def test_of_its_modules_there_is_one_each_whichever_is_imported_first() -> None:
    assert said(PARTS) == "True True True"
