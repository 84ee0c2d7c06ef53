"""What is watched while a load runs: the server's /metrics, GPUs, the generator's host."""
