"""A server that computes nothing: it streams like vLLM, on a schedule, and logs what it sent and
when. What a client is worth is seen against it."""
