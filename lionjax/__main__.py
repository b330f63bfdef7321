# SPDX-License-Identifier: Apache-2.0
"""`python -m lionjax VERB`, where the command itself is not on the path."""

import sys

from lionjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
