"""Scoring and generation."""
