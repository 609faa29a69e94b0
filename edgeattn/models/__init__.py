"""Checkpoints in, one decoder definition in plain torch, families as data."""
