"""Checkpoints of real training runs: N + N steps equal 2N, and every layout reads every other."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_jobs import run_jobs
from helpers.ranks import run_ranks
from helpers.stored import distance, read_tensors, unequal

from nemocascade.megatron.checkpoint import checkpoint_name

HALF, STEPS = 2, 4
ONE: dict[str, int] = {}
TWO_RANKS: dict[str, dict[str, int]] = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
    "ep2": {"ep": 2},
    "tp2 ep2": {"tp": 2, "ep": 2},
    "etp2": {"tp": 2, "etp": 2},
    "dp2": {},
    "cp2": {"cp": 2},
}
FOUR_RANKS: dict[str, dict[str, int]] = {
    "tp2 pp2": {"tp": 2, "pp": 2},
    "pp2 ep2": {"pp": 2, "ep": 2},
    "ep2 etp2": {"tp": 2, "ep": 2, "etp": 2},
    "tp2 dp2": {"tp": 2},
    "cp4": {"cp": 4},
}
# Precision, Megatron's distributed optimizer or its plain one, shape of the model, and precision of
# the moments.
KINDS = [
    ("fp32", True, "relu2", "fp32"),
    ("bf16", True, "swiglu", "fp32"),
    ("bf16", False, "relu2", "fp32"),
    ("fp32", True, "tied", "fp32"),
    ("bf16", True, "relu2", "bf16"),
]
# The quick choice of layouts and kinds; the slow tests take all of them.
QUICK = [
    ("tp2", 2),
    ("pp2", 3),
    ("pp2 vpp2", 0),
    ("ep2", 4),
    ("tp2 ep2", 1),
    ("etp2", 4),
    ("dp2", 2),
    ("cp2", 0),
]
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}


def folder(root: Path, step: int) -> Path:
    return root / checkpoint_name(step)


def train(root: Path, parallel: dict[str, int], kind: tuple[str, bool, str, str]) -> dict[str, Any]:
    precision, distributed, shape, moments = kind
    return {
        "parallel": parallel,
        "precision": precision,
        "distributed": distributed,
        "shape": shape,
        "moments": moments,
        "steps": STEPS,
        "save_at": [HALF, STEPS],
        "root": str(root),
    }


def resume(root: Path, source: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The job from the middle of `source` on, stored once as loaded and once at the end."""
    again = {"root": str(root / "end"), "resave": str(root / "loaded"), "save_at": [STEPS]}
    return {**job, **again, "load": str(folder(source, HALF))}


def name_of(kind: tuple[str, bool, str, str]) -> str:
    return f"{kind[0]} {'distributed' if kind[1] else 'plain'} {kind[2]} moments {kind[3]}"


def check_same_layout(root: Path, whole: dict[str, Any], rest: dict[str, Any]) -> None:
    """N + N steps are 2N steps, in every bit: weights, optimizer, generators, losses."""
    assert rest["losses"] == whole["losses"][HALF:]
    assert rest["noise"] == whole["noise"][HALF:]
    assert rest["extra"] == {"step": HALF, "position": [HALF, "x"]}
    assert unequal(folder(root / "again" / "loaded", HALF), folder(root / "run", HALF)) == []
    assert unequal(folder(root / "again" / "end", STEPS), folder(root / "run", STEPS)) == []


def check_other_layout(
    moved: Path, source: Path, whole: dict[str, Any], rest: dict[str, Any], precision: str
) -> None:
    """Loading gives the stored bits; training continues as it would have, within rounding."""
    changed = unequal(folder(moved / "loaded", HALF), folder(source, HALF), ignore=("rng/",))
    assert changed == []
    expected = pytest.approx(whole["losses"][HALF:], rel=LOSS_TOLERANCE[precision])
    assert rest["losses"] == expected
    if precision == "fp32":
        for prefix in ("model/", "optimizer/exp_avg/", "optimizer/exp_avg_sq/"):
            assert distance(folder(moved / "end", STEPS), folder(source, STEPS), prefix) < 1e-3


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, dict[str, Any]]]:
    """For each kind the root and result of a whole run in one process, resumed as well."""
    root = tmp_path_factory.mktemp("single")
    jobs = []
    for kind in KINDS:
        job = train(root / name_of(kind) / "run", ONE, kind)
        jobs += [job, resume(root / name_of(kind) / "again", root / name_of(kind) / "run", job)]
    results = run_ranks(run_jobs, 1, {"jobs": jobs}, timeout_s=300)[0]
    for i, kind in enumerate(KINDS):
        check_same_layout(root / name_of(kind), results[2 * i], results[2 * i + 1])
    return [(root / name_of(kind) / "run", results[2 * i]) for i, kind in enumerate(KINDS)]


def run_and_resume(
    tmp_path: Path,
    layouts: dict[str, dict[str, int]],
    cases: list[tuple[str, int]],
    ranks: int,
    single: list[tuple[Path, dict[str, Any]]],
) -> None:
    """Train on each layout and resume on it; go on there from one process, and the other way."""
    jobs, back = [], []
    for layout, k in cases:
        root = tmp_path / layout / name_of(KINDS[k])
        job = train(root / "run", layouts[layout], KINDS[k])
        jobs += [job, resume(root / "again", root / "run", job)]
        jobs.append(resume(root / "from one", single[k][0], job))
        back.append(resume(root / "to one", root / "run", train(root, ONE, KINDS[k])))
    results = run_ranks(run_jobs, ranks, {"jobs": jobs}, timeout_s=500)
    ones = run_ranks(run_jobs, 1, {"jobs": back}, timeout_s=500)[0]
    for i, (layout, k) in enumerate(cases):
        root, precision = tmp_path / layout / name_of(KINDS[k]), KINDS[k][0]
        for of_rank in results:
            whole, again, from_one = of_rank[3 * i : 3 * i + 3]
            check_same_layout(root, whole, again)
            check_other_layout(root / "from one", *single[k], from_one, precision)
        check_other_layout(root / "to one", root / "run", results[0][3 * i], ones[i], precision)


def test_two_ranks_and_one_read_each_other(
    tmp_path: Path, single: list[tuple[Path, dict[str, Any]]]
) -> None:
    run_and_resume(tmp_path, TWO_RANKS, QUICK, 2, single)


@pytest.mark.slow
@pytest.mark.parametrize("layout", TWO_RANKS)
def test_two_ranks_with_every_kind(
    layout: str, tmp_path: Path, single: list[tuple[Path, dict[str, Any]]]
) -> None:
    run_and_resume(tmp_path, TWO_RANKS, [(layout, k) for k in range(len(KINDS))], 2, single)


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR_RANKS)
def test_four_ranks_with_every_kind(
    layout: str, tmp_path: Path, single: list[tuple[Path, dict[str, Any]]]
) -> None:
    run_and_resume(tmp_path, FOUR_RANKS, [(layout, k) for k in range(len(KINDS))], 4, single)


@pytest.mark.slow
def test_a_run_moves_from_cp_2_to_one_process_to_cp_4(tmp_path: Path) -> None:
    """Its losses and its end are those of one process that never stopped, within rounding."""
    end = STEPS + HALF
    kind = KINDS[0]
    whole = {**train(tmp_path / "whole", ONE, kind), "steps": end, "save_at": [end]}
    losses = run_ranks(run_jobs, 1, {"jobs": [whole]})[0][0]["losses"]
    found, source = [], None
    for name, ranks, parallel, last in (
        ("two", 2, TWO_RANKS["cp2"], HALF),
        ("one", 1, ONE, STEPS),
        ("four", 4, FOUR_RANKS["cp4"], end),
    ):
        job = {**train(tmp_path / name, parallel, kind), "steps": last, "save_at": [last]}
        if source is not None:
            job["load"] = str(source)
        found += run_ranks(run_jobs, ranks, {"jobs": [job]}, timeout_s=500)[0][0]["losses"]
        source = folder(tmp_path / name, last)
    assert found == pytest.approx(losses, rel=LOSS_TOLERANCE["fp32"])
    for prefix in ("model/", "optimizer/exp_avg/", "optimizer/exp_avg_sq/"):
        distances = distance(
            folder(tmp_path / "four", end), folder(tmp_path / "whole", end), prefix
        )
        assert distances < 1e-3


def test_keys_do_not_depend_on_the_optimizer(single: list[tuple[Path, dict[str, Any]]]) -> None:
    plain = {"parallel": ONE, "precision": "fp32", "distributed": False, "shape": "relu2"}
    moved = single[0][0].parent / "plain"
    job = {**plain, "steps": STEPS, "save_at": [STEPS], "root": str(moved)}
    job = {**job, "load": str(folder(single[0][0], HALF))}
    result = run_ranks(run_jobs, 1, {"jobs": [job]})[0][0]
    assert result["losses"] == single[0][1]["losses"][HALF:]
    assert unequal(folder(moved, STEPS), folder(single[0][0], STEPS)) == []
    keys = read_tensors(folder(moved, STEPS)).keys()
    assert {key.split("/")[0] for key in keys} == {"model", "optimizer", "rng"}


SHARED: dict[str, dict[str, int]] = {
    "dp4": {},
    "tp2 dp2": {"tp": 2},
    "ep2": {"ep": 2},
    "ep4": {"ep": 4},
    "tp2 ep2": {"tp": 2, "ep": 2},
    "ep2 etp2": {"ep": 2, "etp": 2},
    "cp2 dp2": {"cp": 2},
}


@pytest.mark.parametrize(
    "cases",
    [
        [*((name, 1) for name in SHARED), ("dp4", 0), ("dp4", 2), ("tp2 ep2", 2)],
        pytest.param(list(itertools.product(SHARED, (0, 1, 2))), marks=pytest.mark.slow),
    ],
    ids=["quick", "all"],
)
def test_every_rank_writes_as_much_as_the_others(
    cases: list[tuple[str, int]], tmp_path: Path
) -> None:
    """The largest file is at most 1.2 times the mean, also without the distributed optimizer."""
    jobs = []
    for name, k in cases:
        job = train(tmp_path / "unused", SHARED[name], KINDS[k])
        jobs.append({**job, "steps": 0, "resave": str(tmp_path / name / str(k))})
    run_ranks(run_jobs, 4, {"jobs": jobs}, timeout_s=300)
    for name, k in cases:
        files = sorted(folder(tmp_path / name / str(k), 0).glob("rank_*.safetensors"))
        sizes = [file.stat().st_size for file in files]
        assert len(sizes) == 4
        assert max(sizes) <= 1.2 * sum(sizes) / 4, (name, name_of(KINDS[k]), sizes)


def test_before_the_first_step(tmp_path: Path) -> None:
    """An optimizer that has made no step has no state yet; it is stored and loaded all the same."""
    jobs = []
    for kind in KINDS:
        root = tmp_path / name_of(kind)
        job = {**train(root / "run", ONE, kind), "steps": HALF}
        jobs.append({**job, "resave": str(root / "run")})
        jobs.append({**job, "root": str(root / "again"), "load": str(folder(root / "run", 0))})
    results = run_ranks(run_jobs, 1, {"jobs": jobs})[0]
    for i, kind in enumerate(KINDS):
        root = tmp_path / name_of(kind)
        assert results[2 * i]["losses"] == results[2 * i + 1]["losses"]
        assert unequal(folder(root / "run", HALF), folder(root / "again", HALF)) == []


def test_bf16_moments_are_half_as_large(single: list[tuple[Path, dict[str, Any]]]) -> None:
    tensors = read_tensors(folder(single[4][0], HALF))
    kinds = {key.split("/")[1]: t.dtype for key, t in tensors.items() if "optimizer" in key}
    assert kinds == {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16, "main": torch.float32}


def test_the_moments_of_a_checkpoint_may_change(
    tmp_path: Path, single: list[tuple[Path, dict[str, Any]]]
) -> None:
    """From bf16 to fp32 they keep their values; the other way they are rounded to nearest."""
    jobs, sources = [], []
    for k, moments in ((1, "bf16"), (4, "fp32")):
        sources.append(folder(single[k][0], HALF))
        job = resume(tmp_path / moments, single[k][0], train(tmp_path, ONE, KINDS[k]))
        jobs.append({**job, "moments": moments})
    results = run_ranks(run_jobs, 1, {"jobs": jobs})[0]
    for source, k, result, job in zip(sources, (1, 4), results, jobs, strict=True):
        assert result["losses"] == pytest.approx(single[k][1]["losses"][HALF:], rel=5e-3)
        before, after = read_tensors(source), read_tensors(folder(Path(job["resave"]), HALF))
        for key, stored in before.items():
            assert torch.equal(stored.to(after[key].dtype), after[key]), key
        assert {t.dtype for key, t in after.items() if "exp_avg" in key} != {
            t.dtype for key, t in before.items() if "exp_avg" in key
        }


REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "other width": ({"model": {"mlp_width": 64}}, "model.mlp_width is 64 in this run and 48"),
    "other precision": ({"precision": "bf16"}, "set --engine.precision fp32"),
    "frozen router": (
        {"freeze_router": True},
        "optimizer/exp_avg/decoder.layers.1.mixer.router.weight is foreign",
    ),
}


def test_a_foreign_checkpoint_is_rejected_and_named(
    single: list[tuple[Path, dict[str, Any]]],
) -> None:
    base = {"shape": "relu2", "load": str(folder(single[0][0], HALF))}
    jobs = [{**base, **changes} for changes, _ in REJECTED.values()]
    results = run_ranks(run_jobs, 1, {"jobs": jobs})[0]
    for result, (name, (_, text)) in zip(results, REJECTED.items(), strict=True):
        assert any(text in problem for problem in result["rejected"]), (name, result)
