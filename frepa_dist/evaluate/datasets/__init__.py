"""Recipes of public data sets: how a downloaded copy is laid out, checked, and turned into our tables."""
