"""The vLLM backend: pooled prefill states from vLLM's engine, on CPUs and GPUs by the same code (docs/encoders.md)."""
