# SPDX-License-Identifier: Apache-2.0

"""The one exception that is meant for the user.

`main.py` prints its text as a single line and exits with status 2. Every other exception is a bug and keeps its
traceback.
"""


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and what to do."""
