"""Scans on NVIDIA GPUs, compiled by Triton."""
