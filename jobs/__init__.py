"""What `ray job submit` runs: each module is one job, started with `python -m jobs.NAME`."""
