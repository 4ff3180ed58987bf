# SPDX-License-Identifier: Apache-2.0

"""Hindsight: a failed episode in, targets (step, feedback) out."""
