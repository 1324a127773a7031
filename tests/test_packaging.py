"""Run: pytest tests/test_packaging.py. The checkout, the wheel and the sdist hold the same package, importing it does nothing, docs are current."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import typer
from tiny import byte_tokenizer

import compress
from compress import cli
from compress.artifact import Fallback, LayerRecord, Manifest, TensorRecord
from compress.calibration.data import SPECS, load_calibration
from compress.methods import METHODS, describe

ROOT = Path(compress.__file__).parent.parent
SIDE = ("kernels", "calibration", "eval", "recipes")
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="compress is not imported from a checkout")


def python(code: str, cwd: Path, path: Path | None = None) -> str:
    """What a fresh interpreter prints; `path` is where it finds packages beside its own."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": str(path)} if path else {})
    child = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules() -> list[str]:
    """Every module of the package by its dotted name, those of the side folders below compress."""
    files = [f for top in ("compress", *SIDE) for f in (ROOT / top).rglob("*.py")]
    parts = [f.relative_to(ROOT).with_suffix("").parts for f in files]
    return sorted(".".join(p if p[0] == "compress" else ("compress", *p)).removesuffix(".__init__") for p in parts)


# ---- the layout


def test_no_side_folder_has_an_init():
    """A regular package `kernels` in the working directory is what transformers would import in the place of Hugging Face's."""
    assert [str(f) for side in SIDE for f in (ROOT / side).rglob("__init__.py")] == []
    assert all((ROOT / side).is_dir() for side in SIDE)


def test_another_package_called_kernels_is_found_from_the_repository_root(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    assert python("import kernels; print(kernels.__file__)", ROOT, tmp_path) == str(tmp_path / "kernels" / "__init__.py")


def test_transformers_works_from_the_repository_root():
    code = "from transformers import AutoModelForCausalLM, CONFIG_MAPPING as c; print(AutoModelForCausalLM.from_config(" \
           "c['llama'](hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)).num_parameters())"  # fmt: skip
    assert int(python(code, ROOT)) > 0


def test_packages_are_the_tree():
    setuptools = project()["tool"]["setuptools"]
    found = {m.rpartition(".")[0] for m in modules() if "." in m} | {"compress", "compress.recipes"}
    found |= {m for m in modules() if (ROOT / Path(*m.split(".")) / "__init__.py").is_file()}
    assert set(setuptools["packages"]) == found
    assert setuptools["package-dir"] == {"compress": "compress"} | {f"compress.{side}": side for side in SIDE}


def test_package_data_covers_every_file_that_is_not_python():
    data = project()["tool"]["setuptools"]["package-data"]
    listed = {f for package, patterns in data.items() for pattern in patterns for f in folder(package).glob(pattern)}
    others = {f for top in ("compress", *SIDE) for f in (ROOT / top).rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")}
    assert others == listed and {"config.json", "model.safetensors", "tokenizer.json", "README.md", "w4-rtn.yaml"} <= {f.name for f in others}


def folder(package: str) -> Path:
    name = package.split(".")
    return ROOT.joinpath(*(name[1:] if len(name) > 1 and name[1] in SIDE else name))


# ---- importing


OBSERVE = """
import importlib, json, logging, os, random, socket, sys, threading
import accelerate, datasets, huggingface_hub, numpy, pyarrow, pydantic, safetensors.torch, torch, transformers, typer, yaml
import rich.console, rich.progress, rich.table, transformers.quantizers.auto, transformers.conversion_mapping, torch._dynamo

def state():
    b = torch.backends
    return {
        "seeds": [torch.initial_seed(), torch.get_rng_state().tolist(), repr(random.getstate()), repr(numpy.random.get_state())],
        "torch": [str(torch.get_default_dtype()), str(torch.get_default_device()), torch.get_num_threads(), torch.get_num_interop_threads(),
                  torch.is_grad_enabled(), torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
                  b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32, b.cudnn.benchmark, b.cudnn.deterministic, b.mkldnn.matmul.fp32_precision],
        "cuda": torch.cuda.is_initialized(),
        "threads": [t.name for t in threading.enumerate()],
        "tasks": len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0,
        "environment": dict(os.environ), "folder": os.getcwd(), "umask": os.umask(os.umask(0o22) or 0o22),
        "logging": [logging.root.level, len(logging.root.handlers), transformers.utils.logging.get_verbosity(),
                    transformers.utils.logging.is_progress_bar_enabled()],
        "hooks": [repr(sys.excepthook), repr(threading.excepthook), repr(sys.meta_path)],
    }

seen = []
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.mkdir", "os.rename", "os.remove", "signal.signal"):
        seen.append([event, repr(args)])
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        seen.append([event, repr(args)])

def forbidden(*args, **kwargs):
    raise AssertionError("asked for a device")

before = state()
for name in ("is_available", "device_count", "current_device", "get_device_capability", "init"):
    setattr(torch.cuda, name, forbidden)
sys.addaudithook(watch)
for name in NAMES:
    importlib.import_module(name)
after = state()
print(json.dumps({"changed": {k: [before[k], after[k]] for k in before if before[k] != after[k]}, "seen": seen}))
"""


def test_importing_does_nothing(tmp_path):
    """Every module, kernels and the command line included: no device is asked for, nothing is seeded, set, started, written or fetched."""
    assert {"compress.cli", "compress.kernels.dispatch", "compress.calibration.data", "compress.eval.compare"} <= set(modules())
    code = f"import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {str(ROOT)!r})\nNAMES = {modules()!r}\n{OBSERVE}"
    assert json.loads(python(code, tmp_path).splitlines()[-1]) == {"changed": {}, "seen": []}


# ---- wheel and sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(sdist, wheel of what the sdist holds), built offline by the backend itself in a copy of the checkout."""
    try:
        if int(version("setuptools").split(".")[0]) < 77:
            pytest.skip(f"setuptools {version('setuptools')} is older than what pyproject.toml builds with")
    except PackageNotFoundError:
        pytest.skip("setuptools is not installed: nothing to build with")
    root = tmp_path_factory.mktemp("build")
    junk = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "out")
    shutil.copytree(ROOT, root / "tree", ignore=junk)
    code = "from setuptools import build_meta as b; print(b.build_{}(r'" + str(root) + "'))"
    sdist = root / python(code.format("sdist"), root / "tree").splitlines()[-1]
    with tarfile.open(sdist) as archive:
        archive.extractall(root, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # 3.11.2, Debian's, has none
    return sdist, root / python(code.format("wheel"), root / sdist.name.removesuffix(".tar.gz")).splitlines()[-1]


def test_the_wheel_made_from_the_sdist_holds_the_whole_tree(built):
    _, wheel = built
    assert wheel.name == f"compress-{compress.__version__}-py3-none-any.whl"
    held = set(zipfile.ZipFile(wheel).namelist())
    sources = {f.relative_to(ROOT) for top in ("compress", *SIDE) for f in (ROOT / top).rglob("*") if f.is_file() and f.suffix != ".pyc"}
    expected = {f.as_posix() if f.parts[0] == "compress" else f"compress/{f.as_posix()}" for f in sources}
    assert {f for f in held if ".dist-info/" not in f} == expected
    assert {f.rsplit("/", 1)[1] for f in held if ".dist-info/" in f} >= {"METADATA", "LICENSE", "entry_points.txt"}


def test_the_sdist_can_be_tested_and_read(built):
    sdist, _ = built
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CONTRIBUTING.md", "Makefile", "constraints.txt", "tests/tiny.py", "docs/methods.md", "docs/generate.py"} <= held


def test_the_wheel_works_from_another_folder(built, tmp_path):
    with zipfile.ZipFile(built[1]) as archive:  # what `pip install --target` does, without asking an index
        archive.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    code = "import compress, compress.kernels.dispatch, compress.recipe, compress.embedded as e; " \
           "print(compress.__file__, compress.kernels.dispatch.__file__, compress.recipe.RECIPES, *compress.recipe.names(), sep='\\n'); " \
           "print(compress.plan(str(e.model_path()), 'w4-rtn').parameters)"  # fmt: skip
    # PYTHONPATH goes before site-packages: an editable install of this checkout is not what is found
    package, dispatch, recipes, *names, parameters = python(code, tmp_path / "elsewhere", tmp_path / "site").splitlines()
    assert {Path(package).parent, Path(dispatch).parent.parent, Path(recipes).parent} == {tmp_path / "site" / "compress"}
    assert names == compress.recipe.names() and int(parameters) > 3_000_000


# ---- what documents itself


def test_every_option_says_what_it_does():
    described = {m["name"]: m for m in describe()}
    assert list(described) == list(METHODS)
    for name, method in described.items():
        assert len(method["about"]) > 40, name
        for option in method["options"]:
            assert option["help"] and option["values"], f"{name}.{option['name']}: give the field a comment on its line"
    assert {o["name"]: o["default"] for o in described["gptq"]["options"]}["damp"] == METHODS["gptq"]().damp
    clip = {name: next(o for o in m["options"] if o["name"] == "clip") for name, m in described.items() if name in ("rtn", "gptq")}
    assert clip["rtn"]["default"] == "none" and "baseline" in clip["rtn"]["help"] and clip["gptq"]["default"] == "hessian"
    assert clip["gptq"]["values"] == "none, mse, hessian, asymmetric"


def test_docs_methods_is_up_to_date():
    page = runpy.run_path(str(ROOT / "docs" / "generate.py"))["page"]
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == page(), "run: python docs/generate.py"


def test_docs_name_every_field_spec_and_option(tmp_path):
    """What the manifest and the calibration record hold is in the page about it, and no page names an option that the command line lacks."""
    text = {f.name: f.read_text(encoding="utf-8") for f in (ROOT / "docs").glob("*.md")}
    fields = {name for record in (Manifest, LayerRecord, TensorRecord, Fallback) for name in record.model_fields}
    assert {name for name in fields if f"`{name}`" not in text["artifact.md"]} == set()
    (tmp_path / "a.txt").write_text("any text will do")
    record = load_calibration(f"file:{tmp_path / 'a.txt'}", byte_tokenizer(), samples=1, seqlen=8).record
    assert {name for name in (*SPECS, *record) if f"`{name}`" not in text["calibration.md"]} == set()
    root = typer.main.get_command(cli.app)
    commands = [root, *root.commands.values()]
    options = {flag for c in commands for p in c.params for flag in (*p.opts, *p.secondary_opts)} | {"--help"}
    scripts = [*(ROOT / "eval").rglob("*.py"), *(ROOT / "compress" / "embedded").glob("*.py"), *(ROOT / "kernels").glob("*.py")]
    options |= {flag for f in scripts for flag in re.findall(r'add_argument\("(--[a-z-]+)"', f.read_text(encoding="utf-8"))}
    assert {flag for page in text.values() for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", page)} <= options


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{f.name}" for f in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, place = link.partition("#")
        if "://" in link:
            continue
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        headings = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)", target.read_text(), re.M)] if place else []
        assert not place or place in headings, link
