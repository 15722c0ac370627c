"""Experiments that fit or decide more than once: test predictions, leave-one-benchmark-out, perturbed prompts."""
