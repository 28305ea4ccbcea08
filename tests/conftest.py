# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""The tests are the same on every machine: no GPU is seen, also by the processes that they start."""
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""         # before torch asks
