"""Environments: action text in; observation, reward, end and a report for hindsight out."""
