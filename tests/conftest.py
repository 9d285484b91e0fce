"What several test files share. (A test imports `small_training` from this folder: pytest puts it on the path because of this file.)"
import pytest


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    from small_training import make_bench
    return make_bench(tmp_path_factory.mktemp("bench"))
