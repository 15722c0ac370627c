"""Training of probe tokens (prefill/probe_tokens.py) on outcomes."""
