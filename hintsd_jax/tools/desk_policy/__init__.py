# SPDX-License-Identifier: Apache-2.0

"""How the embedded Desk policy was made."""
