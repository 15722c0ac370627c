"""Answers of models to the queries of benchmarks: asked, run in a sandbox and scored."""
