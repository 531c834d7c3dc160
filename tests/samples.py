"""Photographs for the tests, beside the repository.

A test that needs one is skipped where they are missing."""

from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared" / "images"
