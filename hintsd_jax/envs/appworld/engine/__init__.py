# SPDX-License-Identifier: Apache-2.0

"""AppWorld's side: what runs under the Python of its own virtual environment. It imports nothing of hintsd_jax but its
siblings here, and the trainer starts it by its path.
"""
