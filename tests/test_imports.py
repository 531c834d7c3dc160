"""No import circle anywhere, imports inside functions included. Oracle: grimp.

The order of the floors is checked by `lint-imports`; its contracts are in pyproject.toml."""

import grimp


def test_no_files_import_each_other_in_a_circle():
    """Take away what imports nothing that is left, again and again: a circle would stay."""
    graph = grimp.build_graph("miniflux", cache_dir=None)
    left = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    while free := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in free:
            del left[name]
    assert not left
