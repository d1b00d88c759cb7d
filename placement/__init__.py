"""What should happen: pure decisions over frozen views. No clock, no I/O, no global randomness."""
