# SPDX-License-Identifier: Apache-2.0

"""Policies by name: a config goes in, the same config comes out with `policy.path` pinned to a commit whose files are
in the cache of this machine.

The commit then stands in the run's record, as a part of `policy.path`. Invariants: a run continues with the commit that
it began with, whatever the Hub has by then; all processes have the same one; of those on a host one fetches the files.
"""

from __future__ import annotations

import platform

from hintsd_jax import hub, processes
from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError
from hintsd_jax.jsonl import read_object
from hintsd_jax.storage import located


def pinned(config: Config, workdir: str = "", *, only_config: bool = False) -> Config:
    """The config as it is, where `policy.path` is a path; otherwise the name pinned to a commit, and its files fetched.

    workdir: of a run that may have been begun. only_config: see `hub.fetch`. All processes must call it.

    Raises:
      UserError: as `hub.fetch`.
    """
    path = config.policy.path
    name = hub.name_of(path)
    # With processes on several hosts a folder may be there on some of them only: the first one's word counts.
    names = processes.gather(name, "the policy's name")
    if any((other is None) != (name is None) for other in names):
        raise UserError(f"policy.path = {path} is a folder for some processes and not for others: give its whole path")
    if name is None:
        return config
    hosts = processes.gather(platform.node(), "the policy's hosts")
    here = processes.index() if len(hosts) > 1 else 0  # asking for it looks for devices, which a plan does without
    if here == 0:
        name = hub.fetch(_recorded(name, workdir), only_config=only_config)
    name = processes.gather(name, "the policy's commit")[0]
    if here and hosts.index(hosts[here]) == here:
        hub.fetch(name, only_config=only_config)
    processes.gather(None, "the policy")
    return config.replaced({"policy.path": str(name)})


def _recorded(name: hub.Name, workdir: str) -> hub.Name:
    """The commit that the run in a workdir has of this model, where the config leaves it open."""
    if name.revision or not workdir:
        return name
    record = read_object(located(workdir) / "config.json", "a config written by this program") or {}
    path = ((record.get("config") or {}).get("policy") or {}).get("path")
    there = hub.name_of(path) if isinstance(path, str) else None
    return there if there and there.model == name.model and there.is_pinned else name
