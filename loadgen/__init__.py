"""Load tests for LLM servers: scenario → plan → client → record → store → analysis → verdict."""

__version__ = "0.1.0"
