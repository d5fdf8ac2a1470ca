"""Benchmarks after training, run by lm-evaluation-harness: tasks, suites, models and the report."""
