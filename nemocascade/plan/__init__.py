"""Memory, time and layouts of a job before it starts, its checks, and its Slurm scripts."""
