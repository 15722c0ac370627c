"""Prefill: an encoder reads a prompt, and the pooled hidden states of its candidate layers are kept."""
