"""A simulated vLLM: its scheduler, its memory and its wire, on the arithmetic of a GPU."""
