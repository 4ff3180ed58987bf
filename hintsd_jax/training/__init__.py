# SPDX-License-Identifier: Apache-2.0

"""Examples in, one update of the policy out: batches, losses as sums of parts, train state, compiled train step."""
