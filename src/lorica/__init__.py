"""Lorica: training transformers through low-rank updates."""
