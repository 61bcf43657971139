"""Scoring of document question answering: metrics, benchmarks, the evaluation run and its report."""
