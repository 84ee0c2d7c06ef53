"""Run folder → frame → steps → knee and verdict in words → report. Everything is made of the
journals alone, so every table and figure can be remade with another SLO and without another run."""
