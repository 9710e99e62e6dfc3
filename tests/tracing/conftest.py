import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two threads beside other work are slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
