"""`prefill-router doctor`: what would keep the platform from working on this machine, and the way out.

In: the environment (packages, devices, ports, disks, RAY_ADDRESS, MLFLOW_TRACKING_URI). Out: findings, each `ok`,
`warning` or `error`. Writes nothing and starts nothing; a server is asked only where a variable names one. Knows
nothing of the jobs.
"""

from prefill_router.doctor.command import main
from prefill_router.doctor.finding import Finding, diagnose

__all__ = ["Finding", "diagnose", "main"]
