# SPDX-License-Identifier: Apache-2.0

"""Environments: action text in; observation, reward, end and a report for hindsight out."""
