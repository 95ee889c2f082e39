"""What is shipped, under which names, and that a user's own modules do not shadow it."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import ragkv

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("store", "retrievers", "server", "eval")
USERS_OWN = ("server.py", "store.py", "eval.py", "retrievers.py")
IMPORT_ALL = (
    "import ragkv, ragkv.store, ragkv.retrievers, ragkv.server, ragkv.eval, ragkv.demo, ragkv.cli, ragkv.engine"
)


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources() -> list[Path]:
    return [path for room in ("ragkv", *ROOMS) for path in sorted((ROOT / room).rglob("*.py"))]


def run(*command: str, cwd: Path, path: str = "", **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, **options)


def test_every_package_is_listed(project):
    folders = {path.parent.relative_to(ROOT) for path in sources() if path.name == "__init__.py"}
    # rglob does not follow the symlinks ragkv/<room>; the rooms are packages of ragkv wherever they lie.
    found = {".".join(parts.parts if parts.parts[0] == "ragkv" else ("ragkv", *parts.parts)) for parts in folders}
    assert found == set(project["tool"]["setuptools"]["packages"])


def test_every_module_lies_in_a_package():
    assert [path for path in sources() if not (path.parent / "__init__.py").exists()] == []


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_committed_relative_symlinks(project, room):
    link = ROOT / "ragkv" / room
    assert link.is_symlink()
    assert os.readlink(link) == f"../{room}"
    assert project["tool"]["setuptools"]["package-dir"][f"ragkv.{room}"] == room
    if (ROOT / ".git").exists():
        listed = run("git", "ls-files", "-s", f"ragkv/{room}", cwd=ROOT).stdout
        assert listed.startswith("120000 ")


def test_nothing_imports_a_room_by_its_bare_name(project):
    banned = project["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert set(banned) == set(ROOMS)
    for path in [*sources(), *sorted((ROOT / "tests").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not {name.partition(".")[0] for name in names} & set(ROOMS), path


def test_one_version(project):
    assert project["project"]["version"] == ragkv.__version__


def test_importing_ragkv_is_light(tmp_path):
    heavy = ("torch", "transformers", "faiss", "sklearn", "fastapi")
    code = (
        "import sys, ragkv, ragkv.config, ragkv.cli, ragkv.retrievers, ragkv.store; ragkv.Client; ragkv.load_settings; "
        f"print(sorted(set({heavy!r}) & set(sys.modules)))"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path, path=str(ROOT))
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_a_users_own_modules_do_not_shadow_ours(tmp_path):
    for name in USERS_OWN:
        (tmp_path / name).write_text("raise SystemExit('shadowed')\n")
    code = f"import sys; sys.path.append({str(ROOT)!r}); {IMPORT_ALL}"
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what git knows, so that nothing that happens to lie about gets in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source))
    done = run(*build, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_the_bundled_model(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = set()
    for path in sources():
        relative = path.relative_to(ROOT).as_posix()
        expected.add(relative if relative.startswith("ragkv/") else f"ragkv/{relative}")
    assert {name for name in names if name.endswith(".py")} == expected
    assert {"ragkv/py.typed", "ragkv/eval/report/page.css", "ragkv/eval/report/page.js"} <= names
    demo = ROOT / "ragkv" / "demo"
    shipped = [p for p in [*(demo / "model").glob("*"), *(demo / "documents").glob("*")] if p.is_file()]
    assert shipped
    assert {path.relative_to(ROOT).as_posix() for path in shipped} <= names
    assert not any(name.startswith((*ROOMS, "tests")) for name in names)


@pytest.mark.slow
def test_the_installed_wheel_works_beside_a_users_own_modules(wheel, tmp_path):
    target, users = tmp_path / "site", tmp_path / "users"
    users.mkdir()
    for name in USERS_OWN:
        (users / name).write_text("raise SystemExit('shadowed')\n")
    install = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target))
    done = run(*install, str(wheel), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code = f"{IMPORT_ALL}; print(ragkv.__file__, (ragkv.checkpoint.BUNDLED_DIR / 'tokenizer.json').is_file())"
    done = run(sys.executable, "-c", code, cwd=users, path=str(target))
    assert (done.stdout.split(), done.stderr) == ([str(target / "ragkv" / "__init__.py"), "True"], "")
