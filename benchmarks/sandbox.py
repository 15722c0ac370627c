"""Time of an empty Python program in the sandbox, against the same interpreter outside of it.

Both are run in turn, one at a time, without installed packages. The start of a sandbox, the files and its end are part
of the time.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

from pydantic import Field

from prefill_router.cli import main
from prefill_router.collect.sandbox import python, run
from prefill_router.config import FrozenModel


class SandboxBenchmarkConfig(FrozenModel):
    """Number of measurements."""

    rounds: Annotated[int, Field(ge=1, description="programs inside and outside of the sandbox")] = 20


def benchmark(config: SandboxBenchmarkConfig) -> str:
    """Measure the median time of an empty program, with and without the sandbox."""
    interpreter = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    outside, inside, alone = [], [], []
    for _ in range(config.rounds):
        began = time.perf_counter()
        subprocess.run([str(interpreter), "-BS", "-c", "pass"], check=True, env={})
        outside.append(time.perf_counter() - began)
        began = time.perf_counter()
        assert run([*python(), "main.py"], {"main.py": "pass"}).returncode == 0
        inside.append(time.perf_counter() - began)
        began = time.perf_counter()
        assert run(["true"]).returncode == 0
        alone.append(time.perf_counter() - began)
    user = "root" if os.geteuid() == 0 else "a user"
    times = (f"{statistics.median(found) * 1000:.1f} ms" for found in (outside, inside, alone))
    return "as {}: interpreter {}, in the sandbox {}, the command true in the sandbox {}".format(user, *times)


if __name__ == "__main__":
    main(SandboxBenchmarkConfig, benchmark)
