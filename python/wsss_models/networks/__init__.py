"""Backbones: one family a file, parameter names as in the public weights."""
