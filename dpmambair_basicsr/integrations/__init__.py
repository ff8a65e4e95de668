"""Adapters for other programs that use our networks. Each module needs its program, so none is imported by default."""
