"""What all tests rest on."""

import signal

# A shell that starts the tests in the background has SIGINT ignored in them, and in all that they
# start; Ctrl-C is what some of them test.
signal.signal(signal.SIGINT, signal.default_int_handler)
