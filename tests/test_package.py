"""What the package promises as a whole."""

import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import reca_trainer

FAMILIES = ("bagel", "harmon", "janus", "lance", "openuni", "qwen_image", "show_o")  # other tests register one of their own
SOURCE = Path(reca_trainer.__file__).parent


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, reca_trainer; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_public_name_can_be_imported():
    assert set(dir(reca_trainer)) >= {*reca_trainer.__all__, "__version__"}
    for name in reca_trainer.__all__:
        assert getattr(reca_trainer, name).__name__ == name


def test_every_file_beside_the_code_is_part_of_the_wheel():
    settings = ConfigParser()
    settings.read(SOURCE.parents[1] / "setup.cfg")
    patterns = settings["options.package_data"]["reca_trainer"].split()
    packaged = {path for pattern in patterns for path in SOURCE.glob(pattern)}
    files = {path for path in SOURCE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files == packaged


def test_what_is_imported_where_it_is_used_is_an_extra():
    settings = ConfigParser()
    settings.read(SOURCE.parents[1] / "setup.cfg")
    needed = {re.split(r"[<>=]", line)[0] for line in settings["options"]["install_requires"].split()}
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
        for path in SOURCE.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if (isinstance(node, ast.ImportFrom) and not node.level) or isinstance(node, ast.Import)
    }
    others = imported - sys.stdlib_module_names - needed - {"PIL", "reca_trainer"}
    of_extras = {"anyio", "httpx2", "lmms_eval"}  # in modules that are imported where they are used
    of_dependencies = {"fsspec", "pyarrow", "tokenizers", "tqdm", "yaml"}  # what datasets and transformers stand on
    assert others == of_extras | of_dependencies


def imports(path):
    """Modules of this package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reca_trainer"):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("reca_trainer"))


def test_families_do_not_know_each_other_nor_the_trainer():
    for family in FAMILIES:
        for path in (SOURCE / "models" / family).glob("*.py"):
            for module in imports(path):
                others = [f"reca_trainer.models.{other}" for other in FAMILIES if other != family]
                assert not module.startswith(tuple(others)), f"{path} imports {module}"
                assert module not in ("reca_trainer.trainer", "reca_trainer.models.auto"), f"{path} imports {module}"


def test_only_auto_knows_the_families():
    shared = [
        *(path for name in ("common", "contract") for path in (SOURCE / "models" / name).glob("*.py")),
        SOURCE / "models" / "inference.py",
    ]
    for path in [*SOURCE.glob("*.py"), *(SOURCE / "evaluation").glob("*.py"), *shared]:
        known = [module for module in imports(path) if module.startswith("reca_trainer.models.")]
        assert not [module for module in known if module.split(".")[2] in FAMILIES], f"{path} imports {known}"


def test_every_family_has_the_files_that_the_others_have():
    for family in FAMILIES:
        files = {path.name for path in (SOURCE / "models" / family).glob("*.py")}
        assert files >= {"__init__.py"} | {
            f"{part}_{family}.py" for part in ("configuration", "modeling", "processing", "conversion")
        }


def test_no_module_imports_itself_by_way_of_others():
    modules = {}
    for path in SOURCE.rglob("*.py"):
        name = ".".join(("reca_trainer", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        modules[name] = {module for module in imports_at_the_top(path) if module != name}

    def visit(name, above):
        assert name not in above, f"circle: {' -> '.join([*above[above.index(name) :], name])}"
        if name not in done:
            for module in modules.get(name, ()):
                visit(module, [*above, name])
            done.add(name)

    done = set()
    for name in modules:
        visit(name, [])


def test_no_file_is_too_long_to_be_read_at_a_sitting():
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > 700} == {}


def test_the_core_does_not_know_the_embedded_default():
    above = {SOURCE / "cli", SOURCE / "toy"}
    for path in SOURCE.rglob("*.py"):
        if not above & set(path.parents):
            assert not [module for module in imports(path) if module.startswith("reca_trainer.toy")], path


def imports_at_the_top(path):
    """Modules that are imported when a file is; those of types only are not."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reca_trainer"):
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            files = [(SOURCE.parent / name.replace(".", "/")) for name in submodules]
            for name, file in zip(submodules, files, strict=True):
                yield name if file.is_dir() or file.with_suffix(".py").is_file() else node.module
