from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.training import compile as compile_module


def test_the_compiler_times_no_kernels_to_choose_among_them() -> None:
    import torch._inductor.config as config

    with config.patch(deterministic=False, fallback_random=False):
        compile_module.compile_step(nn.Linear(1, 1), torch.device("cpu"))
        assert config.deterministic


@pytest.mark.parametrize(("program", "lacking"), [(None, "no C compiler"), ("/usr/bin/gcc", "Python.h")])
def test_what_triton_needs_on_a_gpu_is_missed_before_the_first_step(
    program: str | None, lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compile_module.shutil, "which", lambda _: program)
    monkeypatch.setattr(compile_module.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(ValueError, match=f"workers.compile=true on GPUs, but host .* has .*{lacking}: install gcc and python3-dev"):
        compile_module.compile_step(nn.Linear(1, 1), torch.device("cuda"))
