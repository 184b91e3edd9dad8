"""Text in, results out: rank, score, generate, and the public Engine and AsyncEngine."""
