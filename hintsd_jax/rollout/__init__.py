# SPDX-License-Identifier: Apache-2.0

"""Episodes: tasks in, finished append-only token streams out."""
