"""Outcomes from the files of evaluations that others have made (docs/importing.md)."""
