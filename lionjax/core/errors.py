# SPDX-License-Identifier: Apache-2.0
"""The error that a user can fix. Imports nothing, so that the command line starts fast."""


class UserError(Exception):
    """A mistake that the user can fix: one clear sentence, shown without a traceback, exit code 2."""
