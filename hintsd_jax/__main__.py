# SPDX-License-Identifier: Apache-2.0

"""`python -m hintsd_jax`: the same as the command `hintsd-jax`."""

from hintsd_jax.main import cli

cli()
