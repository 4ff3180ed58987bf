# SPDX-License-Identifier: Apache-2.0

"""The 240 invented names of Desk: people, files, mails, addresses. Every task gives them other roles, so that none of
them has a meaning.

Two syllables each, so that a byte-level BPE of about a thousand entries holds every name as one token.
"""

_FIRST = ("ba", "de", "fi", "go", "ha", "je", "ki", "lo", "mu", "na", "pe", "ri", "so", "tu", "va", "we")
_SECOND = ("bel", "cor", "dan", "fox", "gim", "hut", "jar", "kin", "lem", "mop", "nut", "pil", "rus", "tam", "zed")

NAMES: tuple[str, ...] = tuple(first + second for first in _FIRST for second in _SECOND)
