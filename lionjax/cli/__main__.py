# SPDX-License-Identifier: Apache-2.0
"""`python -m lionjax.cli VERB`."""

import sys

from lionjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
