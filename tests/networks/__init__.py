"""A zoo of small networks, data shapes and state dicts: definitions only; tests/test_networks.py says what must hold.

`NETWORKS` has each by name. A network's `make` gives its task, or named arrays where there is no data.
"""

from networks import attention, data, images, layers, recurrent, states, structure, weights  # noqa: F401
from networks.zoo import NETWORKS, Network

__all__ = ["NETWORKS", "Network"]
