"""Trains a router on the built-in sample and routes a prompt, in one process: python examples/train_your_own.py"""

import prefill_router as pr

outcomes, pool = pr.load_sample(n_queries=400)
activations = pr.prefill(outcomes, encoder="minilm", to="runs/example/activations", progress=True)
config = pr.FitConfig(components=16, trunk=pr.TrunkConfig(widths=(64,), members=3, kept=2))
fitted = pr.fit(pr.join(outcomes, [activations]), pool, config)
fitted.save("runs/example/checkpoint")
decision = pr.load("runs/example/checkpoint").route("Why is the sky blue?", lam=0.3)
print(f"{decision.model} {decision.chosen.confidence:.6f}")
