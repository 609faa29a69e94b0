"""Quantisation as pure maths: schemes are values, no model names here."""
