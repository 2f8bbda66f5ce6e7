"""Parameters by name, for files that know no trees."""

import jax


def flat_params(params) -> dict:
    """{"stem.kernel": leaf, ...} of a tree of dicts, in the order of its leaves."""
    leaves = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def nested_params(flat: dict) -> dict:
    """The tree whose `flat_params` are `flat`."""
    tree: dict = {}
    for name, leaf in flat.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
