"""Routes prompts with a trained router, without a server: python examples/route.py CHECKPOINT PROMPT ...

CHECKPOINT is a folder (`make demo` writes runs/demo/checkpoint) or models:/prefill-router@champion.
"""

import sys

import prefill_router as pr

checkpoint, *prompts = sys.argv[1:] or ["runs/demo/checkpoint", "What is 17 times 23?", "Why is the sky blue?"]
with pr.load(checkpoint) as router:
    for lam in (0.0, 0.3, 1.0):
        print(f"\nlambda {lam:g}")
        print(router.route_batch(prompts, lam=lam).to_frame().to_string(index=False))
