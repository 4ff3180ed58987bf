# SPDX-License-Identifier: Apache-2.0

"""`python -m hintsd_jax.tools.report`: see `command`."""

import sys

from hintsd_jax.tools.report.command import main

if __name__ == "__main__":
    sys.exit(main())
