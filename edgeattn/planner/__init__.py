"""Arithmetic about what will run where: no torch, no files."""
