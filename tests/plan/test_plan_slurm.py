"""Slurm scripts have the expected text, and run their jobs as it says, with stand-ins for Slurm."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.slurm import free_port
from helpers.stand_ins import SETTINGS, TINY, Played

from nemocascade.plan.errors import PlanError
from nemocascade.plan.slurm import (
    check_submission,
    job_of_script,
    job_script,
    submit_jobs,
    warn_of_steps,
)
from nemocascade.plan.submission import SubmitSettings
from nemocascade.train.lead_time import LeadTime

ROOT = Path(__file__).resolve().parents[2]


def lines_of(settings: SubmitSettings, *arguments: str) -> list[str]:
    return job_script(settings, job_of_script(Path(TINY), "run", arguments)).splitlines()


def test_the_script_says_what_was_asked_for() -> None:
    lines = lines_of(replace(SETTINGS, account="lab", warning_s=300), "--steps", "7")
    for expected in (
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=2:00:00",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@300",
    ):
        assert expected in lines
    text = "\n".join(lines)
    assert "--nnodes=4 --nproc-per-node=8" in text
    assert f"{TINY} --steps 7 &" in text
    assert not re.search(r"(?<!\$)\{[a-z_]+\}", text), "a placeholder is left"
    assert "#SBATCH --no-kill" not in lines
    spare = lines_of(replace(SETTINGS, spare_nodes=2))
    assert {"#SBATCH --nodes=6", "#SBATCH --no-kill"} < set(spare)


def test_servers_are_nodes_of_their_own(tmp_path: Path) -> None:
    settings = replace(
        SETTINGS,
        servers=4,
        server_gpus=2,
        server_model="a folder",
        judge_nodes=1,
        judge_model="lab/judge",
        judge_options="--max-model-len 9",
    )
    job = job_of_script(Path(TINY), str(tmp_path), ("--steps", "7"), rollouts=True)
    text = job_script(settings, job)
    first, *components = text.split("#SBATCH hetjob\n")
    assert "#SBATCH --gpus-per-node=8" in first
    assert [c.splitlines()[0] for c in components] == ["#SBATCH --nodes=4", "#SBATCH --nodes=1"]
    assert all("#SBATCH --gpus-per-node=2" in c for c in components)
    script = tmp_path / "job.sbatch"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "--het-group=1 nemocascade-vllm 'a folder' --announce \"$run_dir/servers\"" in text
    assert "--het-group=2 nemocascade-vllm lab/judge" in text
    assert "--with-tokenizer --max-model-len 9" in text
    assert (
        '--steps 7 --rollout.engine server --rollout.server.announce "$run_dir/servers" '
        "--rollout.server.servers 4 --envs.judge.kind server "
        '--envs.judge.announce "$run_dir/judges" --envs.judge.servers 1 --envs.judge.model judge &'
    ) in text
    assert "hetjob" not in job_script(settings, replace(job, settings=None))
    with pytest.raises(PlanError, match="server_model is empty"):
        check_submission(replace(settings, server_model=""), [])


CODE = ROOT / "recipes" / "tiny" / "code_rl.py"


def test_worker_nodes_are_a_ray_cluster_of_the_job(tmp_path: Path) -> None:
    settings = replace(
        SETTINGS,
        spare_nodes=1,
        account="lab",
        worker_nodes=3,
        worker_partition="cpu",
        container_image="img.sqsh",
        ray="/env/bin/ray",
    )
    job = job_of_script(CODE, str(tmp_path), (), rollouts=True)
    text = job_script(settings, job)
    script = tmp_path / "job.sbatch"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)
    _, workers = text.split("#SBATCH hetjob\n")
    asked = workers.split("\n\n")[0].splitlines()
    for line in ("--nodes=3", "--exclusive", "--partition=cpu", "--account=lab"):
        assert f"#SBATCH {line}" in asked
    assert not any("gpu" in line for line in asked)
    head, others, slots = re.findall(r"srun (.*) /env/bin/ray start.*&?$", text, re.MULTILINE)
    assert head.startswith("--het-group=0 --overlap --no-kill --nodelist")
    assert '--nodelist="$(paste -sd, <<< "$ray_hosts")" --nodes="$(wc -l <<<' in others
    assert "--container-image=img.sqsh" in others
    assert slots.startswith("--het-group=1 --no-kill --cpu-bind=none --nodes=3 --ntasks=3")
    assert (
        '--envs.sandbox.workers ray --envs.sandbox.ray.address "$ray_address" '
        "--envs.sandbox.ray.nodes 3 &"
    ) in text
    servers = replace(settings, servers=1, server_model="m")
    assert "--het-group=2 --no-kill" in job_script(servers, job)
    cascade = replace(job, settings="stages.code_rl.")
    assert "--stages.code_rl.envs.sandbox.workers ray" in job_script(settings, cascade)
    assert "ray start" not in job_script(settings, replace(job, settings=None))


def test_a_job_joins_a_ray_cluster_that_exists(tmp_path: Path) -> None:
    settings = replace(SETTINGS, worker_address="10.0.0.1:6379")
    text = job_script(settings, job_of_script(CODE, str(tmp_path), (), rollouts=True))
    assert "hetjob" not in text
    assert "het-group" not in text
    [join] = re.findall(r"srun .*ray start .*", text)
    assert '--overlap --no-kill --nodelist="$(paste' in join
    assert "ray_hosts=$(healthy)" in text
    assert "--address=$ray_address --num-cpus=0 --num-gpus=0" in join
    assert "ray_address=10.0.0.1:6379" in text
    assert '--envs.sandbox.workers ray --envs.sandbox.ray.address "$ray_address" &' in text
    for wrong, problem in (
        ({"worker_nodes": 1}, "two Ray clusters"),
        ({"worker_address": "ray://x"}, "write it as host:port"),
    ):
        with pytest.raises(PlanError, match=problem):
            check_submission(replace(settings, **wrong), [])


def test_scripts_are_valid_shell(tmp_path: Path) -> None:
    settings = replace(
        SETTINGS, container_image="img.sqsh", container_mounts="/a:/b", environment="/site.sh"
    )
    path = tmp_path / "job.sbatch"
    text = "\n".join(lines_of(settings, "--data.path", "a file; rm -rf /"))
    path.write_text(text)
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "'a file; rm -rf /'" in text
    assert "--container-image=img.sqsh --container-mounts=/a:/b" in text
    assert ". /site.sh" in text


def test_a_site_may_bring_its_template(tmp_path: Path) -> None:
    template = tmp_path / "site.sbatch"
    template.write_text("#!/bin/bash\n#SBATCH -N {nodes}\n{recipe} {arguments}\n")
    assert lines_of(replace(SETTINGS, template=str(template))) == [
        "#!/bin/bash",
        "#SBATCH -N 4",
        f"{TINY} ",
    ]


def test_a_dry_run_prints_everything_and_submits_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = job_of_script(Path(TINY), "run", [])
    assert submit_jobs(replace(SETTINGS, dry_run=True, after="17"), [job, job]) == [
        "JOB_1",
        "JOB_2",
    ]
    printed = capsys.readouterr().out
    assert printed.count("#SBATCH --nodes=4") == 2
    assert "sbatch --parsable --dependency=afterok:17" in printed
    assert "sbatch --parsable --dependency=afterok:JOB_1" in printed


def test_a_machine_without_slurm_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PlanError, match="sbatch is not on the PATH"):
        submit_jobs(SETTINGS, [])


STOP = "kill -USR1 $PPID; for _ in {1..50}; do [ -e $run/stop ] && break; /bin/sleep 0.1; done; "
CRASH = "echo step >> $run/metrics.jsonl; exit 1"


def test_a_crash_starts_the_stage_again(tmp_path: Path) -> None:
    played = Played(tmp_path, [CRASH, CRASH, "exit 0"])
    assert played.done.returncode == 0, played.done.stderr
    assert len(played.calls) == 3
    assert played.lines("pauses") == ["10", "10"], "each start made a step"
    assert not (tmp_path / "requeued").exists()
    ids = [re.findall(r"--rdzv-id=(\S+)", call) for call in played.calls]
    assert len({i for found in ids for i in found}) == 3, "the ranks of two starts must not meet"
    assert not (tmp_path / "run" / "failures").exists()


def test_ranks_have_the_variables_of_allocator_and_nccl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the submitting shell come first."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "TORCH_NCCL_HIGH_PRIORITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    [call] = Played(tmp_path, ["exit 0"]).calls
    variables = call.split(" env ")[1].split(" torchrun ")[0].split()
    assert variables == [
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        "NCCL_NVLS_ENABLE=1",
        "TORCH_NCCL_HIGH_PRIORITY=1",
    ]


def test_a_crash_loop_ends(tmp_path: Path) -> None:
    played = Played(tmp_path, ["exit 1"] * 9, restarts=3)
    assert played.done.returncode == 1
    assert len(played.calls) == 4
    assert played.lines("pauses") == ["10", "20", "40"]
    assert "4 starts in a row have failed without a further step" in played.done.stdout


@pytest.mark.parametrize("code", [2, 3, 5, 130])
def test_an_error_that_would_occur_again_ends_the_job(code: int, tmp_path: Path) -> None:
    played = Played(tmp_path, [f"echo {code} > $NEMOCASCADE_EXIT_CODE; exit 1"])
    assert (played.done.returncode, len(played.calls)) == (code, 1)


def test_what_may_succeed_later_is_tried_again(tmp_path: Path) -> None:
    played = Played(tmp_path, ["echo 75 > $NEMOCASCADE_EXIT_CODE; exit 1", "exit 0"])
    assert (played.done.returncode, len(played.calls)) == (0, 2)


def test_a_node_that_the_watchdog_names_is_replaced(tmp_path: Path) -> None:
    named = "printf '%s\n' a a > $run/suspect_nodes; " + CRASH
    other = "echo b > $run/suspect_nodes; " + CRASH
    played = Played(tmp_path, [named, other, "exit 0"])
    assert played.done.returncode == 0
    nodes = [re.findall(r"--nodelist=(\S+)", call)[0] for call in played.calls]
    assert nodes == ["a,b", "b,c", "b,c"]
    heads = [re.findall(r"--rdzv-endpoint=(\S+):", call)[0] for call in played.calls]
    assert heads == ["a", "b", "b"]
    assert "the watchdog named a: excluded from now on" in played.done.stdout
    assert "named b, and neither the job nor its partition has a node left" in played.done.stdout


NAMED_B = "echo b > $run/suspect_nodes; " + CRASH


@pytest.mark.parametrize(
    ("before", "wanted"), [("", "ExcNodeList=b"), ("d[1-2]\n", "ExcNodeList=d[1-2],b")]
)
def test_without_a_spare_node_the_job_returns_to_the_queue_without_the_named_one(
    before: str, wanted: str, tmp_path: Path
) -> None:
    (tmp_path / "nodes").write_text("a\nb\nb\nc\nd\n")
    if before:
        (tmp_path / "before").write_text(before)
    played = Played(tmp_path, [NAMED_B], using=replace(SETTINGS, nodes=3))
    assert (played.done.returncode, len(played.calls)) == (0, 1), played.done.stderr
    assert (tmp_path / "requeued").exists()
    assert played.lines("updates") == [wanted]
    assert "the watchdog named b, and no node is left to replace it" in played.done.stdout
    assert "too few" not in played.done.stdout


def test_a_partition_without_a_further_node_uses_the_named_one(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("a\nb\nc\n")
    played = Played(tmp_path, [NAMED_B, "exit 0"], using=replace(SETTINGS, nodes=3))
    assert (played.done.returncode, len(played.calls)) == (0, 2)
    assert not (tmp_path / "requeued").exists(), "the job would never start again"
    assert "neither the job nor its partition has a node left" in played.done.stdout


def test_a_site_without_requeue_uses_the_named_node(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("a\nb\nc\nd\n")
    (tmp_path / "kept").touch()
    played = Played(tmp_path, [NAMED_B, "exit 0"], using=replace(SETTINGS, nodes=3))
    assert (played.done.returncode, len(played.calls)) == (0, 2)
    assert "Slurm does not put the job back: the same nodes are used again" in played.done.stdout


def test_each_return_to_the_queue_excludes_the_named_nodes(tmp_path: Path) -> None:
    for name, nodes, said in (
        ("few", "abc", "the partition has too few other nodes to exclude b"),
        ("denied", "abcd", "Slurm does not let this job exclude b, and may give it again"),
        ("asked", "abcd", ""),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "nodes").write_text("\n".join(nodes))
        if name == "denied":
            (folder / name).touch()
        played = Played(folder, [NAMED_B, STOP + "mv $run/stop $run/stop.done; exit 75"])
        assert (played.done.returncode, len(played.calls)) == (0, 2)
        assert (folder / "requeued").exists()
        assert said in played.done.stdout
        assert played.lines("updates") == ["ExcNodeList=b"] * (name == "asked")


def test_a_job_that_is_submitted_anew_counts_from_zero(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "failures").write_text("4\n")
    played = Played(tmp_path, ["exit 1", "exit 0"])
    assert (played.done.returncode, len(played.calls)) == (0, 2)


def test_too_few_other_nodes_use_all_again(tmp_path: Path) -> None:
    """Slurm gave the job nodes that it had excluded before it went back to the queue."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "excluded_nodes").write_text("a\nb\n")
    played = Played(tmp_path, ["exit 0"])
    assert played.done.returncode == 0
    assert "--nodelist=a,b " in played.calls[0]
    assert "all are used again" in played.done.stdout
    assert not (tmp_path / "run" / "excluded_nodes").exists()


# The steps start side by side, in any order. The first step on further nodes dies, then the first
# stage, once its script has seen the end of that step.
AFTER_A_LOSS = """
    nth() { [ "$(grep -c -e "$1" "$PLAYED/calls")" -eq "$2" ]; }
    case "$*" in
      *torchrun*)
        nth torchrun 2 && exit 0
        until [ -s "$PLAYED/dead" ]; do /bin/sleep 0.1; done
        while kill -0 "$(cat "$PLAYED/dead")" 2>/dev/null; do /bin/sleep 0.1; done
        exit 1 ;;
      *--het-group=1*) nth --het-group=1 1 && { echo $$ > "$PLAYED/dead"; exit 0; } ;;
    esac
    exec /bin/sleep 60"""


def test_servers_that_have_died_are_started_again(tmp_path: Path) -> None:
    settings = replace(SETTINGS, servers=1, server_gpus=1, server_model="m", nodes=2)
    job = job_of_script(Path(TINY), str(tmp_path / "run"), [], rollouts=True)
    played = Played(tmp_path, [AFTER_A_LOSS] * 8, job=job, using=settings)
    assert played.done.returncode == 0, played.done.stderr
    starts = [call for call in played.calls if "--het-group=1" in call]
    assert len(starts) == 2


def test_a_lost_ray_cluster_is_started_again(tmp_path: Path) -> None:
    settings = replace(SETTINGS, worker_nodes=1, nodes=2, gpus=False, ray_port=free_port())
    job = job_of_script(CODE, str(tmp_path / "run"), [], rollouts=True)
    played = Played(tmp_path, [AFTER_A_LOSS] * 8, job=job, using=settings)
    assert played.done.returncode == 0, played.done.stderr
    assert sum("start --disable-usage-stats --block --head" in call for call in played.calls) == 2
    assert sum("--het-group=1" in call for call in played.calls) == 2
    token = tmp_path / "run" / "ray_token"
    assert len(token.read_text()) == 64
    assert token.stat().st_mode & 0o077 == 0


def test_raylets_join_from_the_nodes_that_are_left(tmp_path: Path) -> None:
    """A training node is lost with its cluster: the next cluster has a raylet on each other one."""
    settings = replace(
        SETTINGS, worker_nodes=1, nodes=2, spare_nodes=1, gpus=False, ray_port=free_port()
    )
    job = job_of_script(CODE, str(tmp_path / "run"), [], rollouts=True)
    lost = AFTER_A_LOSS.replace("exit 1", "echo b > $run/suspect_nodes; exit 1")
    played = Played(tmp_path, [lost] * 12, job=job, using=settings)
    assert played.done.returncode == 0, played.done.stderr
    joins = [c for c in played.calls if "--address=" in c and "--het-group=0" in c]
    wanted = ("--nodelist=a,b,c --nodes=3 --ntasks=3", "--nodelist=a,c --nodes=2 --ntasks=2")
    assert [next(w for w in wanted if w in join) for join in joins] == list(wanted)


def test_a_warned_job_goes_back_to_the_queue(tmp_path: Path) -> None:
    saved = Played(tmp_path, [STOP + "mv $run/stop $run/stop.done; exit 75"])
    assert (saved.done.returncode, len(saved.calls)) == (0, 1)
    assert (tmp_path / "requeued").exists()
    assert "a checkpoint is written" in saved.done.stdout
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    again = Played(crashed, [STOP + "exit 1"])
    assert (again.done.returncode, len(again.calls)) == (0, 1)
    assert (crashed / "requeued").exists(), "there is no time left for a restart"


def test_a_warning_shorter_than_two_steps_is_named(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = [{"step_time_s": 10.0}, {"other": 1}]
    rows += [{"step_time_s": 400.0, "checkpoint_blocked_s": 20.0}]
    # Rollouts end within seconds of the request.
    rows += [{"step_time_s": 9000.0, "rollout_time_s": 8700.0, "train_time_s": 300.0}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    job = job_of_script(Path(TINY), str(tmp_path), [])
    [warning] = warn_of_steps(SETTINGS, [job])
    assert "two steps and a checkpoint took 820 s" in warning
    assert "--warning-s 820 or more" in warning
    assert warn_of_steps(replace(SETTINGS, warning_s=820), [job]) == []


def test_a_run_warns_once_of_steps_that_are_too_long_for_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    [call] = Played(tmp_path, ['echo "$NEMOCASCADE_WARNING_S" > $PLAYED/lead; exit 0']).calls
    assert "torchrun" in call
    [lead] = (tmp_path / "lead").read_text().split()
    assert lead == str(SETTINGS.warning_s)
    for value, steps in ((lead, [301.0]), ("2000", []), ("", [])):
        monkeypatch.setenv("NEMOCASCADE_WARNING_S", value)
        observed, found = LeadTime(), []
        for row in [{"step_time_s": 9000.0}] * 2 + [{"step_time_s": 301.0}] * 3:
            caplog.clear()
            observed.observe(row)
            found += [row["step_time_s"] for text in caplog.messages if "--warning-s" in text]
        assert found == steps, value
        if steps:
            observed = LeadTime()
            for seconds in (1.0, 1.0, 299.0):
                observed.observe({"step_time_s": seconds, "checkpoint_blocked_s": 3.0})
            assert "take 601 s, and this job asks for a checkpoint 600 s before" in caplog.text
            assert "--warning-s 601 or more" in caplog.text
