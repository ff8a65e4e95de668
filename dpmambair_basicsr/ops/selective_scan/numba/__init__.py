"""Scans on a CPU, compiled by numba."""
