# SPDX-License-Identifier: Apache-2.0

"""Targeted hindsight self-distillation (HINT-SD) for LLM agents, in JAX/Flax."""

import os

# transformers gives us tokenizers only; its remark that there is no PyTorch would greet every user.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.2.0"
