"""Further nodes of a Slurm job, as components of a heterogeneous job: servers, and Ray workers."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace

from nemocascade.plan.submission import SlurmJob, SubmitSettings

RAY_ENVIRONMENT = {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}
"""Environment of raylets: else each starts an idle Python process for each of its CPUs."""
HEAD_S = 60
"""Longest wait for the head of a Ray cluster, in seconds."""


@dataclass(frozen=True)
class ServerNodes:
    """Nodes of a heterogeneous job, each with one server. folder: of their announcements, in the
    run folder. used_by: settings of the recipe that use the servers; {} is the folder."""

    count: int
    folder: str
    model: str
    name: str
    more: str
    used_by: tuple[str, ...]

    def options(self, settings: SubmitSettings) -> str:
        """Lines that ask Slurm for the nodes."""
        own = replace(settings, ranks_per_node=settings.server_gpus, spare_nodes=0)
        named = [f"--nodes={self.count}", "--ntasks-per-node=1", *slurm_options(own)]
        return "#SBATCH hetjob\n" + "".join(f"#SBATCH {o}\n" for o in named)

    def start(self, settings: SubmitSettings, group: int) -> str:
        """Lines that start the servers."""
        parallel = f" --tensor-parallel-size {settings.server_gpus}" if settings.gpus else ""
        more = f" {self.more}" if self.more else ""
        return (
            f"{self.end}"
            f"srun --het-group={group} {settings.serve} {shlex.quote(self.model)} "
            f'--announce "$run_dir/{self.folder}" --name {self.name}{parallel}{more} \\\n'
            f'  > "$run_dir/{self.folder}.txt" 2>&1 &\nservers="$servers $!"\n'
        )

    @property
    def end(self) -> str:
        """Line that removes the announcements: Slurm kills servers without giving them time to."""
        return f'rm -f "$run_dir"/{self.folder}/*.json\n'

    def arguments(self, job: SlurmJob) -> str:
        """Arguments of the recipe that point it at the servers."""
        return " ".join(
            f"--{job.settings}{setting}".format(f'"$run_dir/{self.folder}"', self.count)
            for setting in self.used_by
        )


@dataclass(frozen=True)
class RayJobNodes:
    """Nodes of a heterogeneous job that run programs, and the Ray cluster that they make; 0 nodes
    for a cluster that exists. The head has no slots: it is on the node of this script, so that any
    of the others may be lost. A rank reaches the cluster through the raylet of its own node."""

    count: int
    container: str
    end = ""

    def options(self, settings: SubmitSettings) -> str:
        """Lines that ask Slurm for the nodes."""
        if not self.count:
            return ""
        partition = settings.worker_partition or settings.partition
        own = replace(settings, gpus=False, spare_nodes=0, partition=partition)
        named = [f"--nodes={self.count}", "--ntasks-per-node=1", "--exclusive", *slurm_options(own)]
        return "#SBATCH hetjob\n" + "".join(f"#SBATCH {o}\n" for o in named)

    def start(self, settings: SubmitSettings, group: int) -> str:
        """Lines that start Ray on all nodes."""
        mine = f"srun {'--het-group=0 ' if self.count else ''}--overlap --no-kill"
        hosts = "healthy"
        start = f"{settings.ray} start --disable-usage-stats --block"
        none = "--num-cpus=0 --num-gpus=0"
        if not self.count:
            lines = [f"export ray_address={shlex.quote(settings.worker_address)}"]
            lines += self._joined(mine, hosts, _kept(f"{start} --address=$ray_address {none}"))
            return "\n".join(lines) + "\n"
        head = f"{start} --head --port={settings.ray_port} {none} --include-dashboard=false"
        join = f"{start} --address=$ray_address"
        workers = f"srun --het-group={group} --no-kill --cpu-bind=none"
        lines = [
            # Whoever knows the token can run programs on the cluster.
            'rm -f "$run_dir/ray_token"',
            '(umask 077; od -An -N32 -tx1 /dev/urandom | tr -d " \\n" > "$run_dir/ray_token")',
            'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$run_dir/ray_token"',
            "export " + " ".join(f"{name}={value}" for name, value in RAY_ENVIRONMENT.items()),
            'ray_head="${SLURMD_NODENAME:-$(hostname -s)}"',
            f'export ray_address="$ray_head:{settings.ray_port}"',
            self._step(f'{mine} --nodelist="$ray_head"', 1, head),
            f"for _ in {{1..{HEAD_S}}}; do",
            f'  (: < "/dev/tcp/$ray_head/{settings.ray_port}") 2>/dev/null && break',
            "  sleep 1",
            "done",
        ]
        hosts += ' | grep -vxF "$ray_head"'
        lines += self._joined(mine, hosts, _kept(f"{join} {none}"))
        slots = f"{join} --num-gpus=0 --num-cpus=$SLURM_CPUS_ON_NODE"
        lines.append(self._step(workers, self.count, _kept(slots)))
        return "\n".join(lines) + "\n"

    def _joined(self, srun: str, hosts: str, command: str) -> list[str]:
        """Lines that start a raylet on each of the hosts that a command lists, if there are any.

        They are counted when the lines run: the allocation may have lost nodes since it began, and
        a step that asks for more than are left would never start.
        """
        nodes = '--nodelist="$(paste -sd, <<< "$ray_hosts")"'
        step = self._step(f"{srun} {nodes}", '"$(wc -l <<< "$ray_hosts")"', command)
        return [f"ray_hosts=$({hosts})", f'if [ -n "$ray_hosts" ]; then\n{step}\nfi']

    def _step(self, srun: str, nodes: int | str, command: str) -> str:
        return (
            f"{srun} --nodes={nodes} --ntasks={nodes} {self.container}{command} \\\n"
            '  >> "$run_dir/ray.txt" 2>&1 &\nservers="$servers $!"'
        )

    def arguments(self, job: SlurmJob) -> str:
        """Arguments of the recipe that point it at the cluster."""
        sandbox = f"--{job.settings}envs.sandbox"
        wait = f" {sandbox}.ray.nodes {self.count}" * bool(self.count)
        return f'{sandbox}.workers ray {sandbox}.ray.address "$ray_address"{wait}'


def _kept(command: str) -> str:
    """Command that starts a raylet again when it ends, as one that was killed for memory."""
    return f"bash -c {shlex.quote(f'while :; do {command}; sleep 5; done')}"


def further_nodes(
    settings: SubmitSettings, job: SlurmJob, container: str
) -> list[ServerNodes | RayJobNodes]:
    """Components of a stage's job besides its training nodes; none for one without rollouts.

    container: options of srun for the container of the job.
    """
    found: list[ServerNodes | RayJobNodes] = []
    if job.settings is None:
        return found
    used: tuple[str, ...]
    if settings.servers:
        used = ("engine server", "server.announce {0}", "server.servers {1}")
        found.append(
            ServerNodes(
                settings.servers,
                "servers",
                settings.server_model,
                "policy",
                settings.server_options,
                tuple(f"rollout.{setting}" for setting in used),
            )
        )
    if settings.judge_nodes:
        used = ("kind server", "announce {0}", "servers {1}", "model judge")
        found.append(
            ServerNodes(
                settings.judge_nodes,
                "judges",
                settings.judge_model,
                "judge",
                f"--with-tokenizer {settings.judge_options}".strip(),
                tuple(f"envs.judge.{setting}" for setting in used),
            )
        )
    if settings.worker_nodes or settings.worker_address:
        found.append(RayJobNodes(settings.worker_nodes, container))
    return found


def slurm_options(settings: SubmitSettings) -> list[str]:
    """Options of sbatch for a component of the job, without its number of nodes."""
    named = {
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "gpus-per-node": str(settings.ranks_per_node) if settings.gpus else "",
    }
    # With spare nodes, the job outlives the failure of one.
    kept = ["--no-kill"] if settings.spare_nodes else []
    return [
        *(f"--{name}={value}" for name, value in named.items() if value),
        *kept,
        *settings.sbatch_options,
    ]
