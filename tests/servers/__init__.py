"""Real counterparts of what the service talks to, started by the tests on free loopback ports."""
