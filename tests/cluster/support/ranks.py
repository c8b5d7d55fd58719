"""Run a function on several gloo ranks of this machine, without Ray."""

import multiprocessing
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(rank, ranks, *arguments)` returns on each rank of a fresh process group."""
    group = start_ranks(ranks, function, *arguments)
    while not group.join():
        pass
    results = [pickle.loads((Path(group.folder) / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]
    shutil.rmtree(group.folder)
    return results


def start_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Start the ranks and return at once; `.processes` can be killed, `.join()` is torch's."""
    folder = tempfile.mkdtemp(prefix="ranks-")
    multiprocessing.set_forkserver_preload(["cluster.training.loop"])  # torch and deepspeed are imported once, not once per rank
    group = mp.start_processes(_rank, (ranks, folder, function, arguments), nprocs=ranks, join=False, start_method="forkserver")
    group.folder = folder
    return group


def _rank(rank: int, ranks: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    result = function(rank, ranks, *arguments)
    (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
