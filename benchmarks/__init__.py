"""Benchmarks of the claims on speed; run them with ``make bench``."""
