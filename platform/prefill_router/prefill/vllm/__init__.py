"""The vLLM backend: pooled prefill states from vLLM's engine, on CPUs and GPUs (docs/encoders.md)."""
