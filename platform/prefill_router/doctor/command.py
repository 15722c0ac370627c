"""The command `prefill-router`, whose one subcommand is `doctor`.

Out: a line per finding and a summary, or with `--json` one object. Exit codes: 0 no error, 1 at least one error, 2
invalid usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from prefill_router.doctor.finding import Finding, diagnose
from prefill_router.locations import local_path


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `prefill-router doctor` and exits. `argv` defaults to the arguments of the process."""
    parser = argparse.ArgumentParser(prog="prefill-router", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="check versions, GPUs, ports, registry, encoders and disks")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument("--runs", type=local_path, default=Path("runs"), help="folder of outputs (default: runs)")
    options = parser.parse_args(argv)
    found: list[Finding] = []
    for finding in diagnose(options.runs):
        found.append(finding)
        if not options.json:
            print(finding.line, flush=True)
    counts = Counter(finding.status for finding in found)
    if options.json:
        print(json.dumps({"ok": not counts["error"], "findings": [one.as_dict() for one in found]}, indent=2))
    else:
        print(f"doctor: {counts['error']} errors, {counts['warning']} warnings, {counts['ok']} ok")
    sys.exit(1 if counts["error"] else 0)
