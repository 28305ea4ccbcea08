# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""The tests are the same on every machine: no GPU is seen, also by the processes that they start."""
import os

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""         # before torch asks


def pytest_configure(config):
    """The filter of dvo.py, which pytest replaces: where there is one process, it saves alone on purpose."""
    config.addinivalue_line("filterwarnings", "ignore:torch.distributed is disabled:UserWarning")


# ---------------------------------------------------------------- processes that start before the first test


def starts_early(start):
    """A test that needs what start() begins: processes that take long, while one core has nothing to do."""
    def mark(test):
        test.start = start
        return test

    return mark


def pytest_collection_finish(session):
    if session.config.option.collectonly:
        return
    for item in session.items:
        test = getattr(item, "function", None)
        if hasattr(test, "start"):
            item.started = test.start()


@pytest.fixture
def started(request):
    """What the start of a test that starts early has returned."""
    return request.node.started
