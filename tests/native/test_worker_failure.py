"""A worker that dies takes with it what was on it, and nothing else."""
