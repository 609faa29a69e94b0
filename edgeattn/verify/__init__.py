"""Proof: the same inputs through several implementations, compared tensor by tensor."""
