# SPDX-License-Identifier: Apache-2.0

"""What uses the trainer and is never used by it: the planner, the report, how the embedded policy was made."""
