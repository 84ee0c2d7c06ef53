"""One plan on many hosts: all of it that needs neither Locust nor gevent. `messages` says how."""
