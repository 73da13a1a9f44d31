import pytest
@pytest.fixture(scope="session")
def tiny_folder(): return "/work/build/rand"
