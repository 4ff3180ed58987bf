# SPDX-License-Identifier: Apache-2.0

"""Will a run fit? What it holds on each device, from shapes alone; see `plan`."""
