"""configs/serve.yaml and the command of the documentation that makes its paths absolute."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_the_documented_command_makes_all_paths_absolute(tmp_path: Path) -> None:
    (command,) = re.findall(
        r"^    (sed .*configs/serve\.yaml) > absolute\.yaml$", (ROOT / "docs/serving.md").read_text(), re.M
    )
    printed = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (application,) = yaml.safe_load(printed)["applications"]
    assert application["runtime_env"]["env_vars"]["PYTHONPATH"] == f"{ROOT}:{ROOT}/platform"
    expected = f"{ROOT}/runs/demo/checkpoint"
    assert application["args"]["checkpoint"] == expected
    assert {each["user_config"]["checkpoint"] for each in application["deployments"]} == {expected}
