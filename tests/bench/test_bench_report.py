"""Tables and figures say what the rows say."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import demo, pages, plots, readme, report
from bench.commands.shared import RESULTS
from bench.implementations import names_on

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"


def row(name: str, wall_s: float, peak_mib: float, vocab: int = 1000) -> dict:
    """A stored row: ours takes 2 s and the bare product 1 s in every session."""
    wall = {"ours-active": 2.0, name: wall_s, "bare-product": 1.0}
    return {
        "status": "ok",
        "ours": "ours-active",
        "shape": {
            **{"sequences": 4, "positions": 100, "rows": 50, "vocab": vocab, "hidden": 10},
            "active_fraction": 0.125,
        },
        "errors": {tensor: {"max": 0.0, "relative_l2": 1e-7, "scale": 1.0} for tensor in ("d_hidden", "d_weight")},
        "extra_peak_mib": peak_mib,
        "times": {key: {"wall_s": [value, 9 * value, value], "cpu_s": [value]} for key, value in wall.items()},
        "load_average": [0.5, 2.6 if name == "trl" else 2.0],
        "threads": 2,
        "machine": {"cpu": "CPU", "cores": 2, "memory_gib": 24.0, "cpu_capability": "AVX512"},
        "engine": "native",
        "versions": {"torch": "2"},
        "commit": "abc",
        "date": "2025-01-01 00:00",
        "command": "python -m bench head",
    }


def cells(table: str, title: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {title}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_shows_ratios_beside_their_targets() -> None:
    rows = {
        "ours-active": row("ours-active", 2.0, 100.0),
        "naive-rows": row("naive-rows", 9.0, 500.0),
        "trl": row("trl", 15.0, 150.0),
        "cce": {"status": "wrong", "reason": "d_weight: relative error 1.00e-02 exceeds 5e-04"},
    }
    table = report.table("gemma3-270m", rows)
    assert cells(table, "fastpref, active")[1:7] == ["2.00 (2.00 to 18.00)", "2.00 > 1.7", "0", "1", "100", "1"]
    assert cells(table, "naive torch, response rows")[4:7] == ["**4.50** >= 4.5", "500", "**5.00** >= 5"]
    assert cells(table, "TRL")[4:10] == ["7.50 < 8", "150", "1.50 < 1.6", "1.0e-07", "1.0e-07", "2.6, busy"]
    assert "- Apple CCE, torch_compile: wrong, d_weight" in table
    assert "12.5 % of the columns active" in table


def test_table_of_an_untimed_row_has_errors_and_peak_only() -> None:
    untimed = row("cce", 1.0, 250.0) | {"status": "untimed"}
    del untimed["times"], untimed["load_average"]
    table = report.table("smollm2-135m", {"ours-active": row("ours-active", 2.0, 100.0), "cce": untimed})
    assert cells(table, "Apple CCE")[1:] == ["not timed", "", "", "", "250", "**2.50** >= 2", "1.0e-07", "1.0e-07", ""]


@pytest.mark.parametrize(("workload", "expected"), [("random-init", "1.25 > 1.1"), ("gemma3-270m", "1.25")])
def test_table_compares_exact_with_naive_and_with_the_fallback(workload: str, expected: str) -> None:
    exact = row("ours-exact", 1.6, 100.0)
    exact["times"]["naive-rows"] = {"wall_s": [2.0]}
    table = report.table(workload, {"ours-exact": exact, "naive-rows": row("naive-rows", 2.0, 400.0)})
    assert "- Exact over naive on response rows: time **0.80** <= 1, peak 0.25 > 0.2." in table
    assert f"- Active over exact: time {expected}." in table


def screened(name: str, wall_s: float, peak_mib: float) -> dict:
    """A row with a screened forward pass, exact and naive in its turns."""
    found = row(name, wall_s, peak_mib)
    found["errors"]["token_logps"] = {"max": 6e-3, "rms": 1.7e-4, "relative_l2": 0.0, "scale": 1.0}
    found["screened"] = {"active_fraction": 0.072, "cold_mass": 4e-3, "chunk_rows": 50, "path": "avx512_vnni"}
    for other, taken in (("ours-exact", 3.0), ("naive-rows", 4.0), ("cce", 3.5), ("bare-product", 1.0)):
        found["times"][other] = {"wall_s": [taken] * 3, "cpu_s": [taken]}
    return found


@pytest.mark.parametrize(("workload", "expected"), [("random-init", "1.20 > 1.15"), ("gemma3-270m", "")])
def test_table_says_what_a_screened_row_leaves_in_int8(workload: str, expected: str) -> None:
    rows = {"ours-active": row("ours-active", 2.0, 100.0), "ours-screened": screened("ours-screened", 0.6, 120.0)}
    rows["ours-screened-shared"] = screened("ours-screened-shared", 0.5, 20.0) | {"shared_mib": 160.0}
    if workload == "random-init":
        rows["ours-screened"]["times"]["ours-screened"]["wall_s"] = [3.6] * 3
    table = report.table(workload, rows)
    assert cells(table, "fastpref, screened, int8 copy shared")[5:7] == ["20 + 160 shared", "1.80"]
    assert "- fastpref, screened: 7.2% of the columns multiplied exactly for 50 rows at once" in table
    assert "(avx512_vnni); log-prob of a token off by **1.7e-04** <= 3e-04 nat" in table and "6.0e-03 > 5e-03" in table
    assert ("- Screened over exact: time" in table) == bool(expected) and expected in table
    if not expected:
        assert cells(table, "fastpref, screened ")[2] == "**0.60** <= 0.7"
        assert "- Screened over active with an exact forward pass: time **0.30** <= 1." in table


def test_score_table_has_its_own_products_targets_and_errors(tmp_path: Path) -> None:
    anchor = screened("ours-exact", 0.8, 100.0) | {"ours": "ours-exact"}
    del anchor["screened"]
    shared = screened("ours-screened-shared", 0.4, 20.0) | {"ours": "ours-exact", "shared_mib": 80.0}
    shared["times"]["ours-exact"] = {"wall_s": [0.8] * 3}
    rows = {"ours-exact": anchor, "ours-screened-shared": shared}
    table = report.table("gemma3-270m", rows, "score")
    assert "| error of a token, nat | largest |" in table and table.startswith("### gemma3-270m, scoring\n")
    line = cells(table, "fastpref, screened, int8 copy shared")
    assert line[2:9] == ["**0.40** <= 0.4", "0", "0.50", "20 + 80 shared", "1.00", "1.7e-04", "6.0e-03"]
    assert "Screened over active" not in table
    assert report.tables("score", tmp_path) == "Not measured yet: `python -m bench score --workload gemma3-270m`.\n"
    (tmp_path / "score-gemma3-270m.json").write_text(json.dumps(rows))
    assert report.tables("score", tmp_path) == table


def test_readme_has_a_line_for_each_screened_row(tmp_path: Path) -> None:
    rows = {"ours-active": row("ours-active", 2.0, 100.0), "ours-screened": screened("ours-screened", 0.6, 120.0)}
    rows["ours-screened-shared"] = screened("ours-screened-shared", 0.5, 20.0) | {"shared_mib": 160.0}
    (tmp_path / "head-gemma3-270m.json").write_text(json.dumps(rows))
    score = screened("ours-screened-shared", 0.25, 20.0) | {"ours": "ours-exact", "shared_mib": 160.0}
    score["times"]["ours-exact"] = {"wall_s": [0.75] * 3}
    (tmp_path / "score-gemma3-270m.json").write_text(json.dumps({"ours-screened-shared": score}))
    headline = readme.headline(tmp_path).splitlines()
    assert "**0.60 x** one product" in headline[2] and "off by 1.7e-04 nat" in headline[2]
    assert "**0.25 x** one product" in headline[3]
    table = readme.table(tmp_path)
    for text in (
        "- with a screened forward pass | 0.60 s",
        "copy of the weight shared | 0.50 s",
        "0.30 x the active plan",
    ):
        assert text in table
    assert "peak +180 MiB" in table and "0.33 x the time of exact" in table


def test_draw_products_waits_for_all_of_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "products.png"
    rows = {name: row(name, 3.0, 50.0) for name in ("ours-active", "ours-exact", "naive-rows", "cce")}
    assert not plots.draw_products("dry", rows, file)
    rows["ours-screened"] = screened("ours-screened", 0.6, 50.0)
    for name in plots.IN_PRODUCTS:
        assert not plots.draw_products("dry", rows | {name: {"status": "wrong"}}, file)
    alone = rows["ours-screened"] | {"times": {"ours-screened": {"wall_s": [1.0]}, "bare-product": {"wall_s": [1.0]}}}
    assert not plots.draw_products("dry", rows | {"ours-screened": alone}, file) and not file.exists()
    assert plots.draw_products("dry", rows, file) and file.read_bytes()[:4] == b"\x89PNG"


def test_replace_tables_keeps_the_text_around() -> None:
    document = f"before\n{report.OPEN}\nold\n{pages.CLOSE}\nafter\n"
    replaced = pages.replace_tables(document, "new\n", report.OPEN)
    assert replaced == f"before\n{report.OPEN}\n\nnew\n\n{pages.CLOSE}\nafter\n"
    assert pages.replace_tables(replaced, "new\n", report.OPEN) == replaced


def test_replace_tables_without_marks_raises() -> None:
    for text in ("text", f"{pages.CLOSE}\n{report.OPEN}\n", f"{report.OPEN}\n{report.OPEN}\n{pages.CLOSE}\n"):
        with pytest.raises(ValueError, match="must have one line"):
            pages.replace_tables(text, "new", report.OPEN)


def test_replace_in_says_which_page_has_no_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    with pytest.raises(SystemExit, match=r"page\.md: .*No such file"):
        pages.replace_in(page, "new", report.OPEN)
    page.write_text("text")
    with pytest.raises(SystemExit, match=r"page\.md: .*must have one line"):
        pages.replace_in(page, "new", report.OPEN)
    assert page.read_text() == "text"


@pytest.mark.parametrize(
    ("module", "page", "arguments"),
    [
        ("active_error", "numerics.md", []),
        ("activity", "benchmarks.md", []),
        ("device_counts", "gpu-run.md", []),
        ("epilogue", "gpu-run.md", []),
        ("screened_error", "numerics.md", []),
    ],
)
def test_pages_hold_the_stored_tables(
    module: str, page: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = DOCUMENT.with_name(page).read_text(encoding="utf-8")
    copy = tmp_path / page
    copy.write_text(text, encoding="utf-8")
    monkeypatch.setattr("sys.argv", [module, "--into", str(copy), *arguments])
    importlib.import_module(f"bench.{module}").main()
    assert copy.read_text(encoding="utf-8") == text


def test_document_holds_the_tables_of_the_stored_rows() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    for kind, layout in report.LAYOUTS.items():
        assert pages.replace_tables(document, report.tables(kind, RESULTS), layout.mark) == document


@pytest.mark.parametrize("axis", ["vocab", "rows", "fraction"])
def test_draw_writes_a_picture(tmp_path: Path, axis: str) -> None:
    sweep = [{name: row(name, vocab / 500, vocab / 50, vocab)} for name in ("cce",) for vocab in (2**14, 2**20)]
    plots.draw(sweep, axis, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_draw_names_what_has_rows_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    legends = []
    monkeypatch.setattr(plots, "save", lambda *given: legends.append(given[3].get_legend_handles_labels()[1]))
    plots.draw([{name: row(name, 3.0, 50.0) for name in ("ours-active", "torch-lce")}], "vocab", tmp_path / "sweep.png")
    assert legends == [["fastpref, active", "torch linear_cross_entropy"]]


def test_every_peer_of_a_cpu_is_drawn() -> None:
    assert set(names_on("cpu")) - {"ours-cached"} == set(plots.STYLES)  # cached fails the gate on inputs in fp32


def test_draw_heads_roofline_writes_a_picture(tmp_path: Path) -> None:
    machine = {"gflops": 180.0, "copy_gb_per_s": 20.0, "threads": 2}
    heads = [{"cce": row("cce", 3.0, 50.0), "trl": {"status": "wrong"}}]
    plots.draw_heads_roofline(heads, machine, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes()[:4] == b"\x89PNG"


def test_draw_bars_writes_a_picture(tmp_path: Path) -> None:
    rows = {name: row(name, 3.0, 50.0) for name in ("ours-active", "cce", "trl")}
    plots.draw_bars("dry", rows | {"liger": {"status": "wrong"}}, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("file", "make"), [("README.md", readme.headline), ("docs/results.md", readme.table)])
def test_documents_hold_the_tables_of_the_stored_results(file: str, make: Callable[[Path], str]) -> None:
    document = (DOCUMENT.parents[1] / file).read_text(encoding="utf-8")
    assert pages.replace_tables(document, make(RESULTS), readme.OPEN) == document


def test_ratio_is_that_of_the_median_turn() -> None:
    """The machine was slow in the second turn and ours in the third: medians of each side alone would say 3."""
    times = {"trl": {"wall_s": [4.0, 40.0, 9.0]}, "ours-active": {"wall_s": [2.0, 20.0, 3.0]}}
    assert report.ratio({"times": times}, "trl", "ours-active") == 2.0


def test_headline_has_no_line_without_a_result(tmp_path: Path) -> None:
    assert readme.headline(tmp_path) == "| what | result |\n|---|---|"


@pytest.mark.parametrize(
    ("row", "command"),
    [
        ({"loss": "default", "is_cut": False, "steps": 376}, "make demo"),
        ({"loss": "orpo", "is_cut": False, "steps": 376}, "make demo LOSS=orpo"),
        ({"loss": "sigmoid", "is_cut": True, "steps": 700}, 'make demo LOSS=sigmoid DEMO_ARGS="--steps 700"'),
    ],
)
def test_demo_names_the_command_of_a_user(row: dict, command: str) -> None:
    assert demo.make_command(row) == command
