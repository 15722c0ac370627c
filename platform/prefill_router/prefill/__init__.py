"""Prefill: an encoder reads prompts; the pooled hidden states of its candidate layers are stored."""
