"""What several test files share.

A test imports `small_training` from this folder: pytest puts it on the path because of this file.
Property tests try the same examples on every run of `make test`; `make fuzz` looks for new ones."""
import os
import random
import sys
import time

import pytest
from hypothesis import settings

settings.register_profile('fixed', derandomize=True, deadline=None, database=None)
settings.register_profile('fuzz', deadline=None, database=None, print_blob=True)
settings.load_profile('fixed')

UNTIL = float(os.environ.get('FUZZ_UNTIL', 'inf'))  # set by .ci/fuzz, in seconds since 1970


def pytest_collection_modifyitems(config, items):
    "In another order on every round of `make fuzz`, so that a short budget reaches every test sooner or later."
    if UNTIL < float('inf'): random.Random(config.getoption('--hypothesis-seed')).shuffle(items)


def pytest_runtest_setup(item):
    if time.time() > UNTIL: pytest.skip('the budget of make fuzz is spent')


@pytest.fixture(scope='session')
def bench(tmp_path_factory):
    from small_training import make_bench
    return make_bench(tmp_path_factory.mktemp('bench'))


@pytest.fixture(autouse=True)
def hub_client():
    """The command line may leave the hub's client offline for the rest of the process; the next test begins as this
    one did."""
    client = lambda: sys.modules.get('huggingface_hub.constants')
    before = client().HF_HUB_OFFLINE if client() else os.environ.get('HF_HUB_OFFLINE', '') in ('1', 'ON', 'YES', 'TRUE')
    yield
    if client(): client().HF_HUB_OFFLINE = before
