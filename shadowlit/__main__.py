"""``python -m shadowlit <command>``."""

import sys

from shadowlit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
