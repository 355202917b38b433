"""The house rules that a test can hold: sizes, import freedom, --help budgets, README commands."""

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sae", "autointerp", "evals", "kernels")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
HELP_SECONDS = 0.5
TORCH_FREE = (
    "sae", "sae.errors", "sae.plugins", "sae.config", "sae.console", "sae.manifest", "sae.assets",
    "autointerp", "autointerp.records", "autointerp.config", "autointerp.ledger", "autointerp.prompts",
    "autointerp.dataset", "autointerp.client", "evals", "evals.results", "evals.uncertainty", "evals.leaderboard",
    "evals.pages",
    "evals.base", "evals.run_config", "evals.run_log", "evals.run_all",
)  # fmt: skip
DOORS = ("evals.run_all", "evals.leaderboard", "evals.compare", "evals.serve", "evals.glossary", "sae", "autointerp")


def test_no_file_is_too_long():
    long = {
        str(p.relative_to(ROOT)): n
        for p in [*SOURCES, *TESTS]
        if (n := len(p.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert not long


def test_no_function_is_too_long():
    long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.name} {length}")
    assert not long


def test_public_functions_have_docstrings_and_annotations():
    bare = []
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                name = f"{path.relative_to(ROOT)}:{node.name}"
                if ast.get_docstring(node) is None and not _one_liner(node):
                    bare.append(f"{name}: no docstring")
                if isinstance(node, ast.FunctionDef) and node.returns is None:
                    bare.append(f"{name}: no return annotation")
    assert not bare


def _one_liner(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno <= 4


def test_the_folder_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_tests_are_no_package_and_planted_data_stay_in_tests():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not [p for p in SOURCES if re.search(r"\bplanted\b", p.read_text()) and "import planted" in p.read_text()]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_module_imports_without_torch(module: str):
    heavy = "('torch', 'transformers', 'triton', 'sklearn')"
    code = f"import sys, {module}; bad = [m for m in {heavy} if m in sys.modules]; sys.exit(str(bad) if bad else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.alone
@pytest.mark.parametrize("door", DOORS)
def test_help_is_quick_and_needs_no_torch(door: str):
    """Processor time, best of three: wall time would measure how busy the machine is with the other tests."""
    seconds = []
    for _ in range(3):
        begun = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", door, "--help"], capture_output=True, text=True, cwd=ROOT)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime)
        assert done.returncode == 0 and "usage" in done.stdout.lower(), done.stderr
    assert min(seconds) < HELP_SECONDS


def test_misspelt_option_names_the_near_one():
    done = subprocess.run(
        [sys.executable, "-m", "evals.run_all", "--prset", "quick"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "--preset" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def readme_commands() -> list[str]:
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    return [
        line.strip() for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")
    ]


def test_readme_commands_exist():
    """make targets are in the Makefile; flags of `python -m` doors are known to their --help."""
    commands = readme_commands()
    assert any(c.startswith("make demo") for c in commands) and any(c.startswith("make test") for c in commands)
    makefile = (ROOT / "Makefile").read_text()
    for command in commands:
        words = command.split()
        if words[0] == "make":
            assert re.search(rf"^{re.escape(words[1])}:", makefile, flags=re.M), command
        if "-m" in words and words[words.index("-m") + 1] in DOORS:
            door = words[words.index("-m") + 1]
            rest = words[words.index("-m") + 2 :]
            sub = [rest[0]] if door in ("sae", "autointerp") and rest else []
            text = subprocess.run(
                [sys.executable, "-m", door, *sub, "--help"], capture_output=True, text=True, cwd=ROOT
            ).stdout
            for flag in (w.partition("=")[0] for w in rest if w.startswith("--")):
                assert flag in text, f"{command}: {flag} is unknown to {door}"
