"""llama.cpp's log goes to Python's logging, and nowhere else."""
