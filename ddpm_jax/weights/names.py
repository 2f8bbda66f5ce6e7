"""Names for parameters, for file formats that cannot hold a tree."""

import jax

from ddpm_jax.shapes import PyTree


def flat_params(params: PyTree) -> dict:
    """{"stem.kernel": leaf, ...} for a tree of dicts, in the order of its leaves."""
    leaves = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def nested_params(flat: dict) -> dict:
    """The tree of dicts whose `flat_params` are `flat`."""
    tree: dict = {}
    for name, leaf in flat.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
