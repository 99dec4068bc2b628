"""Nested scores folded into losses: what a training loop uses."""
