"""Runs that show what the library is for: the demo, and the paper's claims."""
