"""The version of the code: the package version and, in a git checkout, the commit."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

__version__ = "0.1.0"


@cache
def code_version() -> str:
    """`0.1.0+g1a2b3c4d`, with `.dirty` for uncommitted changes; `0.1.0` outside a git checkout."""
    here = Path(__file__).parent
    try:  # an installed copy inside another repository does not have the commit of that repository
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", "version.py"], cwd=here, capture_output=True, timeout=10, check=True
        )
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty=.dirty", "--match=", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+g{commit}"
