"""Triton kernels, one file per op; imported as edgeattn.kernels, never by the folder's name."""
