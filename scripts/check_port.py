"""Say in one line that a port is taken, before a server says it in forty: `python scripts/check_port.py HOST PORT`."""

import socket
import sys


def main() -> int:
    """Exit status 1 if nobody could listen on HOST:PORT now."""
    host, port = sys.argv[1], int(sys.argv[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port just left is free
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            remedy = f"end what listens there, or: make serve PORT={port + 1}"
            print(f"serve: cannot listen on {host}:{port} ({error.strerror}); {remedy}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
