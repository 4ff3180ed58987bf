# SPDX-License-Identifier: Apache-2.0

"""Files and weights: Hugging Face directories, PEFT adapters, tokenizers and train states, in and out."""
