"""What is carried to a GPU: the keys of a Triton cache, its filling without a GPU, and what it all weighs."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from bench.gpu.carried import fill, install, launches, sizes  # noqa: E402
from bench.gpu.carried.keys import LIBRARY, Build, build_at  # noqa: E402
from bench.gpu.carried.record import recorded  # noqa: E402
from bench.gpu.fifteen import plan  # noqa: E402
from fastpref.kernels import triton_engine  # noqa: E402
from fastpref.kernels.engine import Head, Int8Head  # noqa: E402
from fastpref.kernels.outputs import LOGP_FIELDS  # noqa: E402
from fastpref.kernels.partials import finish_rows  # noqa: E402
from fastpref.kernels.screening import quantise_rows  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = Path(triton.__file__).parents[1]


def test_build_at_has_the_key_of_triton_itself() -> None:
    from triton.runtime.cache import triton_key

    build = build_at(INSTALLED)
    assert build.key == triton_key() and build.version == triton.__version__


def test_build_at_reads_a_wheel_like_a_folder_and_sees_one_other_file(tmp_path: Path) -> None:
    """Sub-packages, modules beside packages of the same first letters, and what is no module."""
    files = {
        "__init__.py": "__version__ = '1.2.3'\n",
        "runtime/cache.py": "a",
        "compiler/__init__.py": "",
        "compiler/code.py": "b",
        "backends/__init__.py": "",
        "backends/nvidia/__init__.py": "",
        "backends/nvidia/driver.c": "no module",
        "backends/nvidia/driver.py": "c",
        "backends/nvidia/include/cuda.py": "no package",
        "language/__init__.py": "",
        "language/core.py": "d",
        LIBRARY: "e",
    }
    for name, content in files.items():
        file = tmp_path / "triton" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    wheel = tmp_path / "triton-1.2.3-cp312.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in files:
            archive.write(tmp_path / "triton" / name, f"triton/{name}")
    folder = build_at(tmp_path)
    assert build_at(wheel) == folder and list(folder.files) == [
        *("runtime/cache.py", "compiler/code.py", "backends/nvidia/__init__.py", "backends/nvidia/driver.py"),
        *(LIBRARY, "language/core.py"),
    ]
    (tmp_path / "triton" / "language" / "core.py").write_text("other")
    assert build_at(tmp_path).differences(folder) == ["language/core.py"]
    with pytest.raises(FileNotFoundError, match=r"holds no triton/__init__\.py"):
        build_at(tmp_path / "triton")
    assert Build("1", {}).differences(Build("2", {})) == ["version"]


@pytest.fixture(scope="module")
def variants() -> launches.Variants:
    """Of a small head in the active plan."""
    return launches.collect([("v4096-h64-r64", "ours-active")], has_tests=False, has_tiles=False)


def test_collect_finds_what_the_active_plan_launches(variants: launches.Variants) -> None:
    """Under the sizes that the JIT is told, with tiles loaded by the copy engine as on a Hopper GPU."""
    content = [json.loads(text) for text in variants.origins]
    kernels = {one["name"].rsplit(".", 1)[1] for one in content}
    assert {"_linear_logps_fwd_kernel", "_merge_tiles_kernel", "_logit_gradient_kernel"} <= kernels
    forwards = [one for one in content if one["name"].endswith("_linear_logps_fwd_kernel")]
    assert all(one["signature"]["w_ref"] == "tensordesc<bf16[256, 64]>" for one in forwards)
    assert {one["signature"]["mass_ptr"] for one in forwards} == {"constexpr", "*fp32"}
    assert set(variants.origins.values()) == {"ours-active on v4096-h64-r64"} and not variants.incomplete


@pytest.mark.parametrize("name", ["ours-screened", "ours-screened-shared"])
def test_collect_finds_what_a_screened_pass_launches(name: str) -> None:
    """The int8 kernel with masses and without, and the exact one on what is active; of operands of any size."""
    found = launches.collect([("v262144-h4096-r8192", name)], has_tests=False, has_tiles=False)
    content = [json.loads(text) for text in found.origins]
    screening = [one for one in content if one["name"].endswith("_screen_kernel")]
    assert {one["signature"]["mass_ptr"] for one in screening} == {"constexpr", "*fp32"}
    kernels = {one["name"].rsplit(".", 1)[1] for one in content}
    assert {"_linear_logps_fwd_kernel", "_logit_gradient_kernel", "_quantise_kernel"} <= kernels


def test_the_plan_carries_what_its_screened_heads_launch() -> None:
    carried = plan.carried_heads()
    for workload, name in (
        (plan.LARGE, "ours-screened"),
        (plan.LARGE, "ours-screened-shared"),
        (plan.MAIN, "ours-screened"),
    ):
        assert (workload, name) in carried


def test_recorded_specialises_on_true_sizes_and_alignments() -> None:
    """An odd H has no tensor copies; a tensor that begins off a multiple of 16 bytes is not said to begin at one."""
    found: list[dict] = []
    with recorded(lambda text: found.append(json.loads(text))):
        x_RH, weight_VH = (torch.randn(size, 33, dtype=torch.bfloat16, device="cuda") for size in (8, 100))
        labels, head = torch.zeros(9, dtype=torch.int64, device="cuda"), Head(weight_VH, None, 1.0, None)
        for labels_R in (labels[:8], labels[1:]):
            triton_engine.forward_rows(x_RH, head, labels_R, fields=LOGP_FIELDS, bound_R=None, with_cache=False)
        assert x_RH.device.type == "cuda" and torch.cuda.is_available()
    assert torch.zeros(1).device.type == "cpu" and not torch.cuda.is_available()
    forwards = [one for one in found if one["name"].endswith("fwd_kernel")]
    assert [bool(attributes_of(one, "labels_ptr")) for one in forwards] == [True, False]
    assert forwards[0]["signature"]["w_ref"] == "*bf16" and forwards[0]["signature"]["hidden_size"] == "i32"
    assert not attributes_of(forwards[0], "hidden_size") and attributes_of(forwards[0], "parts_ptr")


def test_recorded_gives_results_their_numbers() -> None:
    """So that code that reads them goes on as on a device: log-probs of the formula, masses and a cache."""
    x_RH, weight_VH, labels_R = torch.randn(8, 32).bfloat16(), torch.randn(200, 32).bfloat16(), torch.arange(8) * 20
    with recorded(lambda text: None):
        given = x_RH.to("cuda"), Head(weight_VH.to("cuda"), None, 1.0, None), labels_R.to("cuda")
        bound_R = torch.zeros(8, dtype=torch.float32, device="cuda")
        found = triton_engine.forward_rows(*given, fields=LOGP_FIELDS, bound_R=bound_R, with_cache=True)
        logps_R = finish_rows(found.partials, torch.float32).token_logps.cpu()
        assert found.cache is not None and found.mass_CV is not None
        exponents_RV = found.cache.exponents_RN.repeat_interleave(found.cache.columns_per_group, dim=1)[:, :200].cpu()
        values_RV, mass_V = found.cache.values_RV.cpu(), found.mass_CV.cpu()[0]
        rows, columns = (quantise_rows(values) for values in (given[0], given[1].weight_VH))
        narrow = Int8Head(columns, None, 1.0, None)
        screened_R = (
            triton_engine.screen_rows(rows, narrow, given[2], fields=LOGP_FIELDS, bound_R=None).partials["max"].cpu()
        )
    z_RV = x_RH.double() @ weight_VH.double().t()
    expected_R = torch.log_softmax(z_RV, dim=1).gather(1, labels_R[:, None]).squeeze(1)
    torch.testing.assert_close(logps_R.double(), expected_R, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(screened_R, z_RV.amax(dim=1), rtol=0.02, atol=0.2)
    torch.testing.assert_close(mass_V.double(), z_RV.exp().sum(0), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(values_RV.double() * 2.0 ** exponents_RV.double(), z_RV.exp(), rtol=2**-8, atol=1e-30)


def test_collect_finds_what_the_tuner_leaves_to_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Gluon kernel's trial, with and without masses, statistics and a cache, and its measurement."""
    (tile,) = (tile for tile in launches.CANDIDATES["sm_90/16"] if tile.kernel == "gluon" and tile.group_rows == 16)
    monkeypatch.setattr(launches, "CANDIDATES", {"sm_90/16": (tile,)})
    found = launches.collect([], has_tests=False)
    content = [json.loads(text) for text in found.origins]
    gluon = [one for one in content if one["name"].endswith("gluon_forward.linear_logps_kernel")]
    optional = ("mass_ptr", "values_ptr", "bias_ptr", "softcap")
    given = {tuple(one["signature"][name] != "constexpr" for name in optional) for one in gluon}
    assert {(True, True, False, False), (False, False, False, False), (True, False, True, True)} <= given, given
    assert set(found.origins.values()) == {"tile 128x256 of gluon"}


def attributes_of(content: dict, argument: str) -> list:
    """What the JIT knows of an argument's value."""
    place = list(content["signature"]).index(argument)
    attributes = dict(zip(map(tuple, content["attrs_keys"]), content["attrs_vals"], strict=True))
    return attributes.get((place,), [])


READER = """
import json, sys
from unittest import mock
from triton import knobs
from triton.runtime import cache, driver
from bench.gpu.carried import launches, record
cache.triton_key = lambda: sys.argv[1]
driver.set_active(record.HopperDriver())
found = []
knobs.compilation.listener = lambda *, src, cache_hit, **_: found.append((src.name, cache_hit))
with mock.patch.object(record, "_jit_hook", lambda note: mock.MagicMock()):
    from triton.runtime.jit import JITFunction
    run = JITFunction.run
    def warm(self, *args, grid, warmup, **kwargs):
        if self.fn.__name__ == "_sum_parts_kernel":
            run(self, *args, grid=grid, warmup=True, **kwargs)
    with mock.patch.object(JITFunction, "run", warm):
        launches.collect([("v4096-h64-r64", "ours-active")], has_tests=False, has_tiles=False)
print(json.dumps(found))
"""


def test_a_filled_cache_is_found_by_the_launching_code_of_another_build(
    variants: launches.Variants, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filled for a build with another library, installed for a third: the launching code compiles nothing."""
    here = fill.installed_build()
    target = here._replace(files=here.files | {LIBRARY: "0" * 64})
    third = here._replace(files=here.files | {LIBRARY: "1" * 64})
    wanted = {text: origin for text, origin in variants.origins.items() if "_sum_parts_kernel" in text}
    entries = list(fill.fill(tmp_path / "cache", wanted, target, 1))
    manifest = fill.read_manifest(tmp_path / "cache")
    assert (
        list(manifest["entries"]) == [entry["name"] for entry in entries] and manifest["version"] == triton.__version__
    )
    assert list(fill.fill(tmp_path / "cache", wanted, target, 1)) == [], "compiled again"
    kept = {file.suffix for entry in entries for file in (tmp_path / "cache" / entry["name"]).iterdir()}
    assert kept == {".json", ".cubin"}, "intermediate code would travel"

    monkeypatch.setattr(install, "installed_build", lambda: third)
    row = install.install(tmp_path / "cache", tmp_path / "there")
    assert (
        row["status"] == "ok"
        and row["entries"] == len(entries)
        and "another build of the same version" in row["reason"]
    )
    (tmp_path / "cache").rename(tmp_path / "gone")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "there")}
    environment.pop("TRITON_INTERPRET", None)
    reader = [sys.executable, "-c", READER, third.key]
    done = subprocess.run(reader, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found and all(hit for _, hit in found), found


def test_install_refuses_the_cache_of_another_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Build("3.6.0", {"compiler/code.py": "a", LIBRARY: "b"})
    manifest = {"version": "3.6.0", "files": here.files | {"compiler/code.py": "c"}, "entries": {"X": {}}}
    (tmp_path / fill.MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.setattr(install, "installed_build", lambda: here)
    row = install.install(tmp_path, tmp_path / "there")
    assert row["status"] == "missing" and "differs in compiler/code.py; kernels are compiled here" in row["reason"]
    assert not (tmp_path / "there").exists()


def test_target_build_refuses_a_wheel_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Build("0.1", {LIBRARY: "x"})
    monkeypatch.setattr(fill, "build_at", lambda place: other)
    monkeypatch.setattr(fill, "installed_build", lambda: Build("0.2", {LIBRARY: "x"}))
    with pytest.raises(
        ValueError,
        match=r"is Triton 0\.1, here is 0\.2, and they differ in version; put that Triton in front: .* triton==0\.1",
    ):
        fill.target_build(tmp_path / "triton.whl")


def test_limited_takes_the_most_telling_first() -> None:
    origins = {"a": "head one", "b": "tests", "c": "head two"}
    assert list(fill.limited(origins, "head", None, ["x", "y", "z"])) == ["a", "c"]
    assert list(fill.limited(origins, "", 2, ["x", "y", "z"])) == ["a", "b"]
    assert list(fill.limited(origins, "z", None, ["x", "y", "z"])) == ["c"]


def test_sizes_add_up_and_say_what_is_too_much(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "cache" / "entry").mkdir(parents=True)
    (tmp_path / "wheels" / "peer.whl").write_bytes(bytes(3 * 2**20))
    (tmp_path / "cache" / "entry" / "kernel.cubin").write_bytes(bytes(2**20))
    parts = sizes.weigh(tmp_path)
    assert parts["peer.whl"] == 3.0 and parts["cache"] == 1.0 and 4 < parts["tree"] < 40
    assert sizes.fault(parts) is None and f"{parts['tree'] + 4:7.1f} MiB" in sizes.table(parts)
    assert sizes.unprepared(tmp_path) == []
    (tmp_path / "wheels" / "peer.whl").unlink()
    (lack,) = sizes.unprepared(tmp_path)
    assert lack.startswith(f"{tmp_path / 'wheels'} is empty") and len(sizes.unprepared(tmp_path / "new")) == 2
    found = sizes.fault(parts | {"peer.whl": 70.0})
    assert found is not None and "at most 60 may; the largest part beside the tree is peer.whl (70.0 MiB)" in found
