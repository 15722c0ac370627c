"""`python -m prefill_router.doctor doctor`: the command `prefill-router` where its script is not on the path."""

from prefill_router.doctor.command import main

if __name__ == "__main__":
    main()
