"""The house: which module may import which, what a door is, and what is private to a module."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 380  # lines of a module
DOORS = ("ov_pixart_helper", "gradio_helper")
PACKAGES = ("ov_pixart", "pixart_tiny", "benchmarks")

# module of ov_pixart → those that it may import; imports point downwards only
ALLOWED = {
    "__init__": "upstream",
    # the tutorial's chapters, in the order an image travels
    "trace": "upstream ir quiet",
    "convert": "trace checkpoint sources storage memory upstream ir compress cost hub lora "
    "families checks quiet",
    "components": "ir memory",
    "guidance": "call_checks",
    "partial": "checkpoint ir checks",
    "pipeline": "components guidance partial call_checks interface load_options static_shapes "
    "saving convert checkpoint hub ir upstream families checks quiet",
    "saving": "sources checkpoint storage checks",
    "loading": "pipeline guidance checkpoint sources checks quiet",
    "calibration": "pipeline loading checkpoint storage ir memory checks quiet",
    "optimize": "presets quantize summary calibration checkpoint storage memory ir cost checks",
    "quantize": "presets quality calibration compress ir memory upstream checks quiet",
    "compare": "pipeline loading components call_checks workers plots checkpoint memory checks",
    "judge_preset": "optimize compare summary checkpoint checks",
    "batch": "loading call_checks checkpoint cluster shards storage checks quiet "
    "batch",  # as workers
    # what these stand on
    "shards": "checkpoint storage checks",
    "cluster": "",
    "lora": "hub single_file storage checks quiet",
    "sources": "checkpoint single_file hub cost storage ir checks quiet",
    "single_file": "checks quiet",
    "hub": "checkpoint ir checks",
    "cost": "checkpoint storage",
    "summary": "checkpoint storage ir presets",
    "insights": "pipeline checks",
    "checkpoint": "storage families ir checks quiet",
    "call_checks": "families checks",
    "interface": "families checks",
    "load_options": "convert checkpoint ir checks",
    "static_shapes": "ir checks",
    "storage": "checks",
    "families": "checks quiet",
    "ir": "checks quiet",
    "memory": "checks quiet",
    "plots": "checks quiet",
    "workers": "checks quiet workers",  # by its name, not as __main__
    "upstream": "checks quiet",
    # nothing of ours
    "compress": "",
    "quality": "",
    "presets": "",
    "checks": "",
    "quiet": "",
}


def files(*packages: str) -> list[Path]:
    """The modules of packages, as far as these are here."""
    return [file for package in packages for file in sorted((ROOT / package).rglob("*.py"))]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


LIBRARY = [file for file in files("ov_pixart") if "demo" not in file.parts]
DEMO = files("ov_pixart/demo")
PRODUCT = [*files(*PACKAGES), *(ROOT / f"{door}.py" for door in DOORS)]
OURS = {module_name(file) for file in (*PRODUCT, *files("tests"))}


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(file: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name) for each import; a submodule counts as module, without a name."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file.name} has a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield (submodule, None) if submodule in OURS else (node.module, alias.name)


def imported_from(package: str, file: Path) -> set[str]:
    """The modules of a package that a file imports, without the package's name."""
    modules = {module for module, _ in imported(file)}
    return {m.removeprefix(f"{package}.") for m in modules if m.split(".")[0] == package}


def named(file: Path) -> str:
    return str(file.relative_to(ROOT))


# ---- who imports whom ---------------------------------------------------------------------------


def test_every_module_of_the_library_has_a_row_in_the_table():
    assert {file.stem for file in LIBRARY} == set(ALLOWED)


def test_the_table_has_no_circle():
    rows = {name: set(row.split()) - {name} for name, row in ALLOWED.items()}
    while lowest := {name for name, row in rows.items() if not row & rows.keys()}:
        rows = {name: row for name, row in rows.items() if name not in lowest}
    assert not rows


@pytest.mark.parametrize("file", LIBRARY, ids=named)
def test_imports_point_downwards(file):
    assert imported_from("ov_pixart", file) <= set(ALLOWED[file.stem].split())
    assert not any(imported_from(package, file) for package in (*DOORS, *PACKAGES[1:], "tests"))


@pytest.mark.parametrize("file", [*DEMO, *files("pixart_tiny")], ids=named)
def test_demo_and_pixart_tiny_use_the_doors_public_names(file):
    door = ROOT / "ov_pixart_helper.py"
    imports = [node for node in statements(door) if isinstance(node, ast.ImportFrom)]
    public = {alias.asname or alias.name for node in imports for alias in node.names}
    used = {name for module, name in imported(file) if module == "ov_pixart_helper" and name}
    assert used <= public
    inside = imported_from("ov_pixart", file)
    if file in DEMO:
        inside = {module for module in inside if module.split(".")[0] != "demo"}
    if file == ROOT / "pixart_tiny" / "layers.py":
        rows = (ALLOWED[module] for module in ("quantize", "calibration"))
        inside -= {"quantize", "calibration"}.union(*(row.split() for row in rows))
    assert not inside
    assert not imported_from("benchmarks", file) | imported_from("tests", file)


@pytest.mark.parametrize("file", files("benchmarks"), ids=named)
def test_benchmarks_stand_on_the_library(file):
    assert not imported_from("tests", file) | imported_from("gradio_helper", file)


def test_no_test_module_imports_another():
    tests = files("tests")
    modules = {module_name(file) for file in tests if file.stem.startswith("test_")}
    found = {file.name: {module for module, _ in imported(file)} & modules for file in tests}
    assert not {name: modules for name, modules in found.items() if modules}


# ---- what is private ----------------------------------------------------------------------------


def private_names(file: Path) -> Iterator[str]:
    """Underscore names of our other modules that a file imports, reads or replaces."""

    def is_private(name: str | None) -> bool:
        return name is not None and name.startswith("_") and not name.endswith("__")

    module = tree(file)
    aliases = set()  # names that stand for one of our modules here
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in OURS:
                    aliases.add(alias.asname or alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module in OURS:
            for alias in node.names:
                if f"{node.module}.{alias.name}" in OURS:
                    aliases.add(alias.asname or alias.name)
                elif is_private(alias.name):
                    yield f"{node.module}.{alias.name}"
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if ast.unparse(node.value) in aliases:
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and len(node.args) > 1:  # setattr(module, "_name", …)
            owner, name = ast.unparse(node.args[0]), node.args[1]
            is_name = isinstance(name, ast.Constant) and isinstance(name.value, str)
            if owner in aliases and is_name and is_private(name.value):
                yield f"{owner}.{name.value}"


@pytest.mark.parametrize("file", [*PRODUCT, *files("tests")], ids=named)
def test_an_underscore_means_of_this_module(file):
    assert not set(private_names(file))


def test_a_private_name_would_be_found(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import ov_pixart.ir\n"
        "from ov_pixart import storage as disk\n"
        "from ov_pixart.plots import _PANELS, show_images\n"
        "ov_pixart.ir._core, disk._lock, disk.__doc__, disk.locked, self._own\n"
        "monkeypatch.setattr(disk, '_WRITE_ERRORS', ())\n"
    )
    assert set(private_names(file)) == {
        "ov_pixart.plots._PANELS",
        "ov_pixart.ir._core",
        "disk._lock",
        "disk._WRITE_ERRORS",
    }


@pytest.mark.parametrize("file", PRODUCT, ids=named)
def test_production_code_mocks_nothing(file):
    assert not [module for module, _ in imported(file) if module.startswith("unittest")]


@pytest.mark.parametrize("file", PRODUCT, ids=named)
def test_a_module_is_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGEST


# ---- doors --------------------------------------------------------------------------------------


def statements(door: Path) -> Iterator[ast.stmt]:
    """All but the docstring; a `with quiet_imports():` is looked into."""
    for node in tree(door).body:
        if isinstance(node, ast.With):
            assert ast.unparse(node.items[0]) == "quiet_imports()"
            yield from node.body
        elif isinstance(node, ast.If):
            assert ast.unparse(node) == "if __name__ == '__main__':\n    main()"
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            yield node


@pytest.fixture(params=DOORS)
def door(request) -> Path:
    return ROOT / f"{request.param}.py"


def test_a_door_only_imports_and_re_exports(door):
    for node in statements(door):
        is_alias = isinstance(node, ast.Assign) and isinstance(node.value, ast.Name)
        assert is_alias or isinstance(node, ast.Import | ast.ImportFrom), ast.unparse(node)
