"""Shared by all tests: the CPU, quick compiling, and compiled programs kept between runs in the ignored `.cache/`
folder.
"""

import gc
import importlib.metadata
import importlib.util
import os
import signal
from pathlib import Path

# Before any test imports jax; environment variables so that subprocesses of tests have them too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the tests' time is compiling; without the costly passes it takes a third, and the small rollouts and
# updates that then take three times as long weigh less.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test goes to the Hub: those about it have a server of their own
# XLA's newer way of making CPU loops goes through MLIR, and compiles the update in 7.5 s of CPU where the older one
# takes 1.9 (13 and 9 optimised). jaxlib 0.11 has no such flag any more, and a flag that XLA does not know ends the
# process.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()

# A shell's background jobs ignore SIGINT, and so would every process that a test starts and then interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

# Tracing makes millions of short-lived objects, and each full collection looks at all that a long suite holds: a tenth
# of the time of the tests that compile.
gc.set_threshold(100_000, 50, 1000)


def has_libtpu() -> bool:
    """Whether the TPU compiler is where `hintsd_jax.tools.planner.topologies` looks for it."""
    made = Path(__file__).parents[1] / ".cache" / "libtpu" / "libtpu" / "libtpu.so"
    return "TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu") is not None or made.exists()


def pytest_collection_modifyitems(items):
    """Long files first, so that none is left to one process at the end, and of these the one whose compiled programs
    others load; what needs libtpu is skipped without it.
    """
    if not has_libtpu():
        for item in items:
            if item.get_closest_marker("libtpu"):
                item.add_marker(pytest.mark.skip(reason="no TPU compiler: `make libtpu` (Linux x86_64 only)"))
    shared = "test_train.py"
    items.sort(key=lambda item: (item.path.name != shared, not getattr(item.module, "LONG", False)))
