"""What a compressed weight is: a small tree of arrays, the waist between what decides and what stores.

Integer arrays are structure: the file entropy-codes them. Float arrays are parameters: they are trained, rounded, or
rewritten by the next method. A bare float array is a legal tree. Every node rebuilds its dense weight with `unpack`,
from the same lines for NumPy and for torch, so gradients reach each float leaf. Nothing here knows of bytes or of
training, and torch is never imported. `NODES` is the closed table of what a file may hold.
"""

from tersenet.packed.products import Factored, Transformed, contractions, dct, kernel_dct
from tersenet.packed.seeded import Bloomier, Hashed, Lattice, sixteenth
from tersenet.packed.tree import (
    DEEPEST,
    Array,
    Packed,
    Tree,
    arrays,
    check_tree,
    check_tree_values,
    children,
    float_leaves,
    is_integer,
    map_arrays,
    narrowed,
    parts_of,
    unpack,
)
from tersenet.packed.values import (
    Codebook,
    Reshaped,
    Sliced,
    Sparse,
    Uniform,
    half_powers,
    places,
    ungrouped,
)

__all__ = [
    "DEEPEST",
    "NODES",
    "Array",
    "Bloomier",
    "Codebook",
    "Factored",
    "Hashed",
    "Lattice",
    "Packed",
    "Reshaped",
    "Sliced",
    "Sparse",
    "Transformed",
    "Tree",
    "Uniform",
    "arrays",
    "check_tree",
    "check_tree_values",
    "children",
    "contractions",
    "dct",
    "float_leaves",
    "half_powers",
    "is_integer",
    "kernel_dct",
    "map_arrays",
    "narrowed",
    "parts_of",
    "places",
    "sixteenth",
    "ungrouped",
    "unpack",
]

# The order is part of the file format: only ever append.
NODES: dict[str, type[Packed]] = {
    node.__name__: node
    for node in (Uniform, Codebook, Sparse, Sliced, Factored, Transformed, Reshaped, Bloomier, Lattice, Hashed)
}
