"""Tests; importable as `tests.tiny` and so on from the repository root."""
