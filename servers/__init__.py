"""The things under test: servers that a run starts, or finds, and watches."""
