# SPDX-License-Identifier: Apache-2.0

"""What a run leaves behind: its workdir, checkpoints, metrics and what it shows while it goes."""
