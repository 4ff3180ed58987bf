# SPDX-License-Identifier: Apache-2.0

"""Run folders in, one HTML page out: reading, counting, and the page's own files. Imports no jax: a report is made in
about a second.
"""
