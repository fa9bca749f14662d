"""The entry of `shoal`: quick to import, so that Ctrl-C is quiet from the first moment."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; exits with its code (130 after Ctrl-C)."""
    try:
        from shoal.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
